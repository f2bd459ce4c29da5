"""The families of interest model, by name. A new one is a file here and a line in the table."""

from common.models.families.recommend import Recommend
from common.models.interface import InterestModel

FAMILIES: dict[str, type[InterestModel]] = {"recommend": Recommend}
