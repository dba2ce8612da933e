"""The frozen language model: loading it, hooking it, the text held out for it."""
