"""python -m diffusion fit|validate|test|predict|check --config diffusion/configs/NAME.yaml"""

from common.training.cli import main

if __name__ == "__main__":
    main("diffusion")
