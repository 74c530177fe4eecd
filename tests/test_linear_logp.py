"""kernels.linear_logp against a ten-line reference in fp64, at odd shapes."""
import math

import pytest
import torch

from kernels import linear_logp
from kernels import linear_logp as op
from tiny import difference
