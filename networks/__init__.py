"""Networks as plain nn.Modules, independent of losses, data and methods."""
