"""What a sparse autoencoder (SAE) is: encode, loss and gradient, read and write.

In: activations [B, D] or a file. Out: the latents that fire [B, K], reconstructions, gradients, files.
Must not import: text, activations, or anything after them.
"""
