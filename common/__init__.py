"""What server and sites must agree on. Imports neither `server` nor `client` nor `simulations`."""
