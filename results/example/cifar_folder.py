"""Write a part of CIFAR-100 as an image-folder dataset, data/CIFAR-100/: 100 images of each class,
chosen at random but always the same, for training, and as many for testing.

    python results/example/cifar_folder.py
"""
import random
from pathlib import Path

import torchvision

IMAGES_PER_CLASS = 100

for part in ("train", "test"):
    data = torchvision.datasets.CIFAR100("data", train=part == "train", download=True)
    for label, name in enumerate(data.classes):
        folder = Path("data", "CIFAR-100", part, name)
        folder.mkdir(parents=True, exist_ok=True)
        of_class = [i for i, target in enumerate(data.targets) if target == label]
        for i in random.Random(name).sample(of_class, IMAGES_PER_CLASS):
            image, _ = data[i]
            image.save(folder / f"{i:05d}.png")
