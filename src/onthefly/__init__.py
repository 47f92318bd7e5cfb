"""OnTheFly: git and a debugger for PyTorch training runs."""
