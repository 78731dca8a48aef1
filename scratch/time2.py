import torch, model_new as m, sys, os
from torch.profiler import profile, ProfilerActivity
x=torch.randn(16,64,32,32,32,device='cuda'); w=torch.randn(64,128,3,3,3,device='cuda'); g=torch.ones(128,device='cuda')
z=torch.empty(256<<20,dtype=torch.uint8,device='cuda')
def prof(name,f,n=5):
    with torch.no_grad():
        for _ in range(3): f()
        with profile(activities=[ProfilerActivity.CUDA]) as pr:
            for _ in range(n): z.zero_(); f()
            torch.cuda.synchronize()
    print(name, {e.key[:40].replace('void ',''): round(e.self_device_time_total/e.count,1) for e in pr.key_averages() if e.self_device_time_total>0 and 'emset' not in e.key and 'Fill' not in e.key})
if __name__=='__main__':
    prof('plain p0',lambda: m.conv_transpose3d(x,w))
    prof('plain p1',lambda: m.conv_transpose3d(x,w,padding=1))
    prof('fused p0',lambda: m.conv_transpose3d_relu_group_norm(x,w,None,g,g,8))
    prof('fused p1',lambda: m.conv_transpose3d_relu_group_norm(x,w,None,g,g,8,padding=1))
    for sh,co,k in (((4,64,64,64,64),64,3),((2,32,64,128,128),32,3),((4,16,64,64,64),16,3),((2,320,16,16,16),320,3),((4,128,32,32,32),128,5),((4,20,33,47,51),36,3)):
        x1=torch.randn(sh,device='cuda'); w1=torch.randn(sh[1],co,k,k,k,device='cuda')
        prof(f'{sh} {co} {k}',lambda: m.conv_transpose3d(x1,w1,padding=k//2))
        torch.backends.cudnn.benchmark=True
        prof('   torch',lambda: torch.nn.functional.conv_transpose3d(x1,w1,padding=k//2))
