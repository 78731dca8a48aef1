import torch
from torch.profiler import profile, ProfilerActivity
z=torch.empty(256<<20,dtype=torch.uint8,device='cuda')
def prof(name,f,n=5):
    with torch.no_grad():
        for _ in range(3): f()
        with profile(activities=[ProfilerActivity.CUDA]) as pr:
            for _ in range(n): z.zero_(); f()
            torch.cuda.synchronize()
    print(name, {e.key[:40].replace('void ',''): round(e.self_device_time_total/e.count,1) for e in pr.key_averages() if e.self_device_time_total>0 and 'emset' not in e.key and 'Fill' not in e.key},flush=True)
