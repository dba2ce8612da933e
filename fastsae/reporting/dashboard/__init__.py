"""The page about one SAE: curves, distributions, and a view of every latent."""
