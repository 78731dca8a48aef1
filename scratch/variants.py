import torch, sys, os, types
src=open('model_new.py').read()
from scratch_prof import prof
x=torch.randn(16,64,32,32,32,device='cuda'); w=torch.randn(64,128,3,3,3,device='cuda'); g=torch.ones(128,device='cuda')
def variant(name,*reps):
    s=src
    for a,b in reps:
        assert a in s,(name,a); s=s.replace(a,b)
    d={'__name__':'v'}; exec(compile(s,name,'exec'),d)
    prof(name+' plain',lambda: d['conv_transpose3d'](x,w))
    prof(name+' fused',lambda: d['conv_transpose3d_relu_group_norm'](x,w,None,g,g,8))
    prof(name+' fused_same',lambda: d['conv_transpose3d_relu_group_norm'](x,w,None,g,g,8,padding=1))
variant('base')
variant('no norm',('const bool in_kernel = dtype == kFloat32 && out_volume(*g) % 4 == 0;','const bool in_kernel = false;'))
