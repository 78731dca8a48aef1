import torch, sys, os, types
src=open('model_new.py').read()
from scratch_prof import prof
x=torch.randn(16,64,32,32,32,device='cuda'); w=torch.randn(64,128,3,3,3,device='cuda'); g=torch.ones(128,device='cuda'); xz=torch.zeros_like(x)
def variant(name,*reps):
    s=src
    for a,b in reps:
        assert a in s,(name,a); s=s.replace(a,b)
    d={'__name__':'v'}; exec(compile(s,name,'exec'),d)
    prof(name+' plain',lambda: d['conv_transpose3d'](x,w))
    prof(name+' zeros',lambda: d['conv_transpose3d'](xz,w))
nofin=('        if (a.p.t.vectors) finish<kBlockN, 4>(a, tile, slice, d);\n        else finish<kBlockN, 1>(a, tile, slice, d);','        if (a.dtype==77) finish<kBlockN, 4>(a, tile, slice, d);')
n256=('for (int block_n : {256, 232, 192, 160, 128, 64})','for (int block_n : {256})')
variant('no finish',nofin)
variant('no finish, n256',nofin,n256)
variant('no finish, no shift',nofin,('const uint32_t b = box + (kh * dilation_h * t.pitch + kw * dilation_w) * row_bytes;','const uint32_t b = shared_address(input + in.stage * t.input_bytes);'))
variant('no finish, no loads',nofin,('''    mbarrier_arrive_expect_tx(full, t.weight_bytes);
    tma_load_3d(weights + (consumer * t.weight_stages + at.stage) * t.weight_bytes, map, full, c, tile.m0 + (t.split_m ? consumer * kWarpgroupM : 0), k);''','mbarrier_arrive(full);'))
