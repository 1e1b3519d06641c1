"""How to install what an installation of zerotop lacks: the extras of pyproject.toml."""

INSTALL_TRAINING = "pip install '.[train]' in zerotop's source folder"
INSTALL_FINETUNING = "pip install '.[train,finetune]' in zerotop's source folder"
