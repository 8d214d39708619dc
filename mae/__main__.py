"""python -m mae fit|validate|test|predict|check --config mae/configs/NAME.yaml"""

from common.training.cli import main

if __name__ == "__main__":
    main("mae")
