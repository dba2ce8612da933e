"""What an SAE is worth on held-out text, and which latents tell two sets of texts apart."""
