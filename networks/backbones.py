"""The encoder-decoders that a method can use, by the name of --backbone."""

from networks.uxnet import UXNet
from networks.vnet import VNet

BACKBONES: dict[str, type[VNet] | type[UXNet]] = {"vnet": VNet, "uxnet": UXNet}
