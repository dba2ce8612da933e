"""The sparse autoencoder: the module, its activations, and the files it is kept in."""
