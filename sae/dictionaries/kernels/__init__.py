"""The sparse steps of an SAE (choose, decode, differentiate, update) on CPU, in PyTorch and in Triton: one meaning.

In: tensors. Out: tensors, the same on every device up to rounding.
Must not import: anything but sae.common.
"""
