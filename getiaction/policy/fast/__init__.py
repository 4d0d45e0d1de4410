"""The networks' own maths, sooner: what `policy/` does is right without any of this, and reads better.

On a CPU, to learn: `convolution` (by `taps` where that is faster), `native_blocks` (a residual block as one call of
C), `native_norms` (what lies between two convolutions) and `native_pictures` (a convolution of pictures, by
`native_winograd` where its products are fewer), with `native_layers`, which says where, and `activation` (Mish). To
act: `native_unet` (the U-Net as one call of C) or `unrolled` (as a flat list of PyTorch's calls), with `unroll` and
`copies`, which choose and keep what they need, and `packed` (a ResNet). `native` compiles what is in C. On a CUDA
GPU: `kernels` finds `fused` (the U-Net's layers), `fused_pictures` (a ResNet's, with `fused_stem`,
`fused_group_norm`, `fused_batch_norm` and `twin`), `few` (convolutions that see few places) and `sums`; `beside` has
streams for what a backward pass does not wait for; `replay` makes a step or a chunk one CUDA graph, with `clearing`,
`replays` tells which graph a call takes, and `watch` notices when none may be.
"""
