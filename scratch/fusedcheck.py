import torch, model_new as m, torch.nn.functional as F
torch.manual_seed(1)
def rel(a,b): return ((a.double()-b).norm()/b.norm()).item()
for sh,co,k,G,p in (((16,64,32,32,32),128,3,8,0),((16,64,32,32,32),128,3,8,1),((3,20,9,31,33),36,3,4,1),((2,64,9,11,13),96,3,3,0),((1,64,16,24,24),320,3,32,1)):
    x=torch.randn(sh,device='cuda'); w=torch.randn(sh[1],co,k,k,k,device='cuda')*.05; g=torch.randn(co,device='cuda'); b=torch.randn(co,device='cuda'); cb=torch.randn(co,device='cuda')
    for save in (False,True):
        w.requires_grad_(save)
        with m.record_launches() as l: y=m.conv_transpose3d_relu_group_norm(x,w,cb,g,b,G,padding=p).detach()
        y2=m.conv_transpose3d_relu_group_norm(x,w,cb,g,b,G,padding=p).detach()
        n=min(2,sh[0]); t=F.group_norm(F.conv_transpose3d(x[-n:].double(),w.detach().double(),cb.double(),padding=p).relu(),G,g.double(),b.double())
        r=F.group_norm(F.conv_transpose3d(x,w.detach(),cb,padding=p).relu(),G,g,b)
        print(sh,co,G,save,l[-1][-12:],'ours',rel(y[-n:],t),'ref',rel(r[-n:],t),'same',torch.equal(y,y2),'close',torch.allclose(y,r,1e-4,1e-4),flush=True)
