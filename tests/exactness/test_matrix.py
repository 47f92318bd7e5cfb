"""Killed and resumed equals never stopped, attached equals not attached: over all kinds of training, bit for bit.

The cells are chosen so that every two values of different factors meet in one, and a few more at random. Those with the
marker `long` are all random: `ONTHEFLY_CELLS=1000 ONTHEFLY_SEED=7 pytest -m long tests/exactness`.
"""

import os
import random

import exactness_law as law
import pytest
from conftest import SEED
