"""Model families, one module each: `decoder_config(hf)` and the table `WEIGHTS`; `known.py` lists and picks them."""
