"""Networks as pure nn.Modules: they know no loss, no data and no method."""
