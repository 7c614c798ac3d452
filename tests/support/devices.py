"""Where the tests of Triton's kernels run them: on a GPU, or interpreted on the CPU."""

import torch

TRITON_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
