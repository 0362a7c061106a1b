"""What DRKD relates: the cells of a map by a graph, the boxes of an image by attention."""

from torch import Tensor, nn

from ssim_kd.losses import valid_cells
from ssim_kd.modeling import CellBatchNorm


class GraphReasoning(nn.Module):
    """x + BN(1x1(Z B)): cells are gathered in nodes, which are related, and given back.

    With X = 1x1(x) of 2m channels and B = 1x1(x) of m: V = X B^T, a sum over the cells, holds m
    nodes, Z = W ReLU(V + R(V)), R a linear layer over the nodes and W one over their channels. The
    norm begins as 0, the whole as the identity.
    """

    def __init__(self, channels: int, nodes: int) -> None:
        """
        Args:
            channels: C of the maps.
            nodes: m.
        """
        super().__init__()
        self.state = nn.Conv2d(channels, 2 * nodes, 1)
        self.assign = nn.Conv2d(channels, nodes, 1)
        self.relate = nn.Linear(nodes, nodes)
        self.update = nn.Linear(2 * nodes, 2 * nodes, bias=False)
        # The norm would take a bias away.
        self.out = nn.Conv2d(2 * nodes, channels, 1, bias=False)
        self.norm = CellBatchNorm(channels)
        nn.init.zeros_(self.norm.weight)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """
        Args:
            x: (N, C, H, W).
            mask: (N, H, W) bool, the cells that count; None: all.

        Returns:
            (M, C): the M cells of all images that count.
        """
        assign = self.assign(x)
        if mask is not None:
            assign = assign.masked_fill(~mask[:, None], 0.0)
        assign = assign.flatten(2)
        nodes = self.state(x).flatten(2) @ assign.transpose(1, 2)
        nodes = (nodes + self.relate(nodes)).relu()
        nodes = self.update(nodes.transpose(1, 2)).transpose(1, 2)
        found = self.out((nodes @ assign).unflatten(2, x.shape[2:]))
        return valid_cells(x, mask) + self.norm(valid_cells(found, mask))


class BoxRelation(nn.Module):
    """z = x + out(softmax(theta(x) phi(x)^T o w) g(x)): attention between the boxes of an image.

    w, the relation filter, is a softmax over the boxes of a linear layer: how much a box matters to
    the others.
    """

    def __init__(self, features: int) -> None:
        """
        Args:
            features: of a box, C x 3 x 3.
        """
        super().__init__()
        inner = features // 2
        self.theta, self.phi, self.g = (nn.Linear(features, inner) for _ in range(3))
        self.out = nn.Linear(inner, features)
        self.filter = nn.Linear(features, 1)

    def forward(self, crops: Tensor) -> Tensor:
        """
        Args:
            crops: (R, C, 3, 3) of the R boxes of an image; R may be 0.

        Returns:
            (R, C, 3, 3).
        """
        x = crops.flatten(1)
        weights = self.filter(x)[:, 0].softmax(dim=0)
        attention = (self.theta(x) @ self.phi(x).T * weights).softmax(dim=1)
        return crops + self.out(attention @ self.g(x)).view_as(crops)
