"""Trains self-critically under a grid of settings, and writes down losses, rewards and every sample by step and image.

deepspeed --num_accelerators 2 tests/engine/self_critical.py SPEC.json RESULTS.json
"""

from grid import build, main

from blipds import cli, distributed


def run_setting(spec, folder, device):
    trainer, recorder = build(spec, folder, device)
    objective, drawn = trainer.objective, []
    rewarded = objective.rewarded

    def note(image, samples):
        drawn.append((trainer.state.global_step + 1, image, [sample.ids for sample in samples]))
        return rewarded(image, samples)

    objective.rewarded = note
    trainer.train()
    results = {key: [line[key] for line in recorder.lines] for key in ("loss", "grad_norm", "reward", "entropy")}
    results["drawn"] = sorted(sample for share in distributed.gather(drawn) for sample in share)
    trainer.close()
    return results


if __name__ == "__main__":
    cli.run(lambda: main(run_setting))
