"""What the process that commands are forked from has imported. It must not have started a thread."""

import open_clip  # noqa: F401
import torch

import qclip.artifact
import qclip.cli.app
import qclip.doctor
import qclip.reporting
import qclip.spectral
import qclip.zoo  # noqa: F401

torch.set_num_threads(1)
