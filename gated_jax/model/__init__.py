"""The parameters: linen modules over the functions of `ops`."""
