"""New tensors after the pattern of a Dual: Duals without a tangent, so that they can be written to."""

from ..registry import fresh

fresh("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like")
fresh("new_zeros", "new_ones", "new_empty", "new_empty_strided", "new_full", "new_tensor")
