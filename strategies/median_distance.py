r"""A strategy of one's own: trust a client less when it is far from most others.

Run it from the folder that holds ``strategies``, as it stands::

    fedweight run simulations/quickstart.toml \
        --strategy strategies.median_distance:MedianDistance

Where it comes from: robust statistics weighs a measurement by how far off it lies, in
units of what is usual (Cauchy's weight function). How far off a client lies is its
median distance from all clients, which up to half of them cannot move, as they could
move a mean. A client at the usual distance keeps half its weight at ``tolerance = 1``;
one ten times as far off keeps a hundredth.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from fedweight.strategies import Round, WeightingStrategy


class MedianDistance(WeightingStrategy):
    """Weigh clients by data size, over ``1 + (distance / (tolerance * usual))^2``.

    Parameters
    ----------
    tolerance : float
        Above 0, in units of the usual distance, the clients' median. Very large
        values are FedAvg; very small ones weigh by data size over the squared distance.
    """

    tolerance: Annotated[float, Field(gt=0)] = 2.0

    def weights(self, round: Round) -> Tensor:
        """Return one weight for each client; they sum to one."""
        distances = round.updates.pairwise_distances().median(dim=1).values
        round.log("distance", distances)
        usual = distances.median()
        if usual == 0:
            return round.size_weights
        odd = distances / (self.tolerance * usual)
        weights = round.size_weights / (1 + odd.square())
        return weights / weights.sum()
