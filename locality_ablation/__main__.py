"""python -m locality_ablation fit|validate|test|predict|check --config locality_ablation/configs/NAME.yaml"""

from common.training.cli import main

if __name__ == "__main__":
    main("locality_ablation")
