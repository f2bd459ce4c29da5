"""The families of interest model, one file each; `common.models.names` lists them."""
