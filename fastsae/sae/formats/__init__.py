"""How SAEs lie on disk: one file for each library whose form is read and written."""
