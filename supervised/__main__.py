"""python -m supervised fit|validate|test|predict|check --config supervised/configs/NAME.yaml"""

from common.training.cli import main

if __name__ == "__main__":
    main("supervised")
