"""What is predicted, one file each; `common.models.names` lists them."""
