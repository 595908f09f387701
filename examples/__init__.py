"""The commands of eval.py and data.py, and bridges to other files and projects; the six modules stand without them."""
