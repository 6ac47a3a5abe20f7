"""From a profile to finished steps and phases: what runs, in which order, and how it is reported. The modules, in reading order:

* `precompute`, `recipes` (`base`, `stages`), `ablations`, `scaling`, `machine`, `rental`: the parts of a profile. `grid`: the runs of the
  scaling grid. `config`: the profile, made of these parts and validated. `mixtures`, `outside`: the data that the profile names.
* `steps`: what a step is and when it is done. `make` finds its result or runs its job; `adopt` takes a result from elsewhere.
* `phase`: what a phase is, and what it produces. `direct` runs phases in this process.
* `plan`, `dollars`, `bill`: what a run would do and cost, and what it has cost. `rented`: other code for rented machines.
* `knowledge`, `board`, `status`: what phases write to the volume for people to read.
* `phase_flow`, `pipeline_flow`: a phase and the pipeline as Prefect flows. `helpers`: a phase on several workers; `waiting`: waits until a
  flow run ends; `status_board`, `artifacts`: what the UI shows.

Only the modules of the last point import Prefect; an import rule in pyproject.toml enforces this.
"""
