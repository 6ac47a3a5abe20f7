"""From a profile to finished steps and phases: what runs, in which order, and what is shown of it. In an order to read them in:

* `precompute`, `recipes` (`base`, `stages`), `ablations`, `scaling`, `machine`, `rental`: the parts of a profile. `grid`: the runs of the
  scaling grid. `config`: the profile, made of these and checked. `mixtures`, `outside`: what it names, checked against what there is.
* `steps`: what a step is and when it is done. `make` finds its result or runs its job; `adopt` takes a result from elsewhere.
* `phase`: what a phase is, and what it leaves. `direct` runs phases in this process.
* `plan`, `dollars`, `bill`: what a run would do and cost, and what it has cost. `rented`: what else rented machines need.
* `knowledge`, `board`, `status`: what phases write for people on the volume.
* `phase_flow`, `pipeline_flow`: a phase and the pipeline as Prefect flows. `helpers`: a phase on several workers; `waiting`: until a
  flow run ends; `status_board`, `artifacts`: what the UI shows.

Only the modules of the last point import Prefect; an import rule in pyproject.toml says so.
"""
