"""What has no tangent: comparisons, questions about shape and type, integers."""

from torch import Tensor

from ..registry import constant

# comparisons
constant("gt", "ge", "lt", "le", "eq", "ne", "greater", "greater_equal", "less", "less_equal", "not_equal")
constant("equal", "allclose", "isclose", "isin")
# of each number
constant("isnan", "isinf", "isfinite", "isposinf", "isneginf", "isreal", "signbit")
constant("logical_and", "logical_or", "logical_xor", "logical_not", "all", "any")
# of shape and type
constant("is_floating_point", "is_complex", "is_signed", "is_inference", "is_nonzero", "is_same_size", "is_contiguous")
constant("numel", "nelement", "ndimension", "dim", "size", "stride", "storage_offset", "element_size", "get_device")
constant("is_tensor", "is_pinned", "is_shared", "is_conj", "is_neg", "result_type", "can_cast", "shape", "dtype")
constant("device", "layout", "ndim", "requires_grad", "is_cuda", "is_cpu", "itemsize", "nbytes", "__len__")
# the value alone, because it was asked for
constant(Tensor.__repr__, Tensor.__format__)
