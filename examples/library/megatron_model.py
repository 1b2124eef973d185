"""A virtual-width model of megatron-core by hand, forward and backward: python examples/library/megatron_model.py"""

import torch

import megatron_vwn.cpu

megatron_vwn.cpu.install()  # before Megatron is imported; changes nothing where there is a GPU

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

torch.distributed.init_process_group(store=torch.distributed.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)

width = megatron_vwn.VirtualWidthConfig(m=2, n=8)  # a stream of 8 segments of 64 / 2 channels: 4 times as wide
config = TransformerConfig(num_layers=4, hidden_size=64, num_attention_heads=4, transformer_impl="local")
spec = megatron_vwn.stack_spec(width, config)
model = megatron_vwn.VirtualWidthModel(
    config, spec, vocab_size=96, max_sequence_length=16, hybrid_layer_pattern="*-*-", virtual_width=width
).cuda()

tokens = torch.randint(96, (2, 17), device="cuda")
positions = torch.arange(16, device="cuda").expand(2, 16)
mask = torch.ones(1, 1, 16, 16, dtype=torch.bool, device="cuda").triu(1)  # True: not attended to
loss = model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
loss.backward()
print(f"loss {loss.item():.3f}")
torch.distributed.destroy_process_group()
