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
nostore=('if (in0 && live[half]) store_pair(a.out, a.dtype, row[half] + offset0, v0, v1);','if (in0 && live[half] && v0 == 123.456f) store_pair(a.out, a.dtype, row[half] + offset0, v0, v1);')
variant('base')
variant('no store',nostore)
variant('weights once',('''                    mbarrier_arrive_expect_tx(head.weight_full + weight.stage, t.weight_bytes);
                    tma_load_3d(weights + weight.stage * t.weight_bytes, w_map, head.weight_full + weight.stage, c, tile.m0, (kd * K_h + kh) * K_w + kw);''','mbarrier_arrive(head.weight_full + weight.stage);'))
variant('weights once, no store',nostore,('''                    mbarrier_arrive_expect_tx(head.weight_full + weight.stage, t.weight_bytes);
                    tma_load_3d(weights + weight.stage * t.weight_bytes, w_map, head.weight_full + weight.stage, c, tile.m0, (kd * K_h + kh) * K_w + kw);''','mbarrier_arrive(head.weight_full + weight.stage);'))
variant('no stagger',('if (!started && threadIdx.x / 128 == 2) mbarrier_wait(&head.stagger, 0);',''))
