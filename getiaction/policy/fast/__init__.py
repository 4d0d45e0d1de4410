"""The networks' own maths, sooner: what `policy/` does is right without any of this, and reads better.

On a CPU: `convolution` (layers that learn by `taps` where that is faster), `activation` (Mish), and for acting
`native_unet` (the U-Net as one call of `native`, which compiles `native.c`) or `unrolled` (as a flat list of PyTorch's
calls), with `unroll` and `copies`, which choose and keep what they need. On a CUDA GPU:
`kernels` finds `fused` (the U-Net's layers), `fused_pictures` (a ResNet's, with `fused_stem`, `fused_group_norm`,
`fused_batch_norm` and `twin`), `few` (convolutions that see few places) and `sums`; `replay` makes a step or a chunk
one CUDA graph, `replays` tells which graph a call takes, and `watch` notices when none may be.
"""
