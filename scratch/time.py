import torch, model_new as m, sys
from torch.profiler import profile, ProfilerActivity
from harness import timing
from reference import *
names=sys.argv[1:] or ['fused','fused_same']
dev=torch.device('cuda',0)
for p in PROBLEMS:
    if p.name not in names: continue
    a=(m.ModelNew if p.model=='fused' else m.ConvTranspose3dNew)(**p.init).cuda(); x=torch.randn(p.input_shape,device='cuda')
    def f(_=None):
        with torch.no_grad(): return a(x)
    for _ in range(3): f()
    with profile(activities=[ProfilerActivity.CUDA]) as pr:
        for _ in range(5): f()
        torch.cuda.synchronize()
    for e in pr.key_averages():
        if e.self_device_time_total>0: print('   ',e.key[:70], e.count, f'{e.self_device_time_total/e.count:.1f} us')
    print(p.name, 'fwd', timing.measure(f,lambda:None,dev)[0])
    xg=x.clone().requires_grad_()
    print(p.name, 'fwd recording', timing.measure(lambda _:a(xg).shape,lambda:None,dev)[0])
