"""What the kernels of all families share: the gates, and their gradients.

Columns of coefficients, of their logits and of W come as [carry n or 0 | write m | read m] in every kernel: what a
write needs comes first, and what it leaves to the next read comes last. Parameters stay as ``ops.parameters`` has them,
[read | carry | write], so kernel column k is parameter column (k + m) mod K.
"""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Absolute error 1e-7, which is what a deviation is added to."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def load_routing(pointer, place, exists):
    """Deviations of A and B^T from their pattern, in fp32."""
    return tl.load(pointer + place, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def load_scale(pointer, place, exists):
    """S, whose deviation from one is what is learned, in fp32."""
    return 1.0 + tl.load(pointer + place, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def deviation(z, routing_ptr, scale_ptr, place, exists, ones, DYNAMIC: tl.constexpr, SIGMOID: tl.constexpr):
    """Coefficients minus their initial pattern (``ops.reference.coefficients`` has all of them), in fp32.

    z: logits in fp32, any if not DYNAMIC; place: of the parameters, in [N, K]; exists, ones: where there is a
    coefficient and where its pattern is one. Where there is none, this is S tanh(z): zero for a logit of zero.
    """
    # Routing comes last: loaded before, it would take registers while the gates are formed.
    if DYNAMIC:
        scale = load_scale(scale_ptr, place, exists)
        if SIGMOID:
            gate = tanh(0.5 * scale * z)
            return tl.where(ones, gate, 0.0) + load_routing(routing_ptr, place, exists) * (1.0 + gate)
        else:
            gate = scale * tanh(z)
            return load_routing(routing_ptr, place, exists) + gate
    else:
        return load_routing(routing_ptr, place, exists)


@triton.jit
def deviation_backward(dc, z, routing_ptr, scale_ptr, place, exists, ones, SIGMOID: tl.constexpr):
    """Gradient of the logits for a gradient of a dynamic connection's coefficients; arguments as ``deviation``."""
    scale = load_scale(scale_ptr, place, exists)
    if SIGMOID:
        factor = load_routing(routing_ptr, place, exists) + tl.where(ones, 1.0, 0.0)
        gate = tanh(0.5 * scale * z)
        return dc * factor * 0.5 * scale * (1.0 - gate * gate)
    else:
        gate = tanh(z)
        return dc * scale * (1.0 - gate * gate)
