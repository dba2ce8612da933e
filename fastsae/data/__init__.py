"""From text to batches of activations: text, tokens, harvest, buffer; each stage with its own state."""
