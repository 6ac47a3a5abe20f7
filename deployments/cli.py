"""The `fvlm` command."""

import os
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
from cyclopts import App
from rich.console import Console

from deployments.options import DEFAULT_VOLUME, Changes, Cloud, KeepServer, Live, Port, Profile, Recipes, Videos, Volume, table_console
from fvlm_core.errors import UserError
from fvlm_core.exit_status import USER_ERROR
from infra.api import problem_with
from infra.errors import InfraError, RefusedError
from infra.stack import REPOSITORY, Stack, StackError, StackRefusedError, require_access
from infra.start import collect_rarely
from infra.volume import known_volume_id

if TYPE_CHECKING:
    from tasks.config import PipelineConfig

app = App(
    name="fvlm",
    version=lambda: version("fvlm"),
    help="A video language model that reads each frame as one token, and the complete pipeline that trains and releases it.",
)
# by name, so that each is imported only when it is called: the pipeline's command is slow to start even without them
app.command("deployments.convert:app", name="convert")
app.command("deployments.data:app", name="data")
app.command("deployments.scaling:app", name="scaling")
app.command("deployments.machines:app", name="infra")
app.command("deployments.machines:volume_app", name="volume")
app.command("deployments.machines:board", name="board")
app.command("deployments.evaluate:evaluate", name="eval")
app.command("deployments.use:chat", name="chat")
app.command("deployments.use:look", name="look")
app.command("deployments.push:push", name="push")
app.command("deployments.use:serve", name="serve")
app.command("deployments.space:space", name="space")
app.command("deployments.stream:stream", name="stream")


@app.command
def speedrun(
    *,
    profile: Profile = "laptop",
    videos: Videos = None,
    volume: Volume = DEFAULT_VOLUME,
    keep_server: KeepServer = False,
    port: Port = None,
    changes: Changes = (),
    cloud: Cloud = None,
) -> int:
    """Run the complete pipeline: from videos to an evaluated and packaged model. Run it again to resume."""
    from deployments.speedrun import speedrun as run

    emulated = cloud is not None
    return run(profile, videos, volume, changes=changes, keep_server=keep_server, port=port, console=Console(), emulated=emulated)


@app.command(name="run")
def run_phase(
    phase: str,
    /,
    *,
    profile: Profile = "laptop",
    videos: Videos = None,
    volume: Volume = DEFAULT_VOLUME,
    keep_server: KeepServer = False,
    port: Port = None,
    changes: Changes = (),
) -> int:
    """Run one phase by itself; earlier phases must be done.

    Parameters
    ----------
    phase
        Its name, e.g. `evaluate`.
    """
    from deployments.speedrun import speedrun as run

    return run(profile, videos, volume, changes=changes, keep_server=keep_server, port=port, console=Console(), phase=phase)


@app.command
def plan(
    *,
    profile: Profile = "laptop",
    videos: Videos = None,
    volume: Volume = DEFAULT_VOLUME,
    changes: Changes = (),
    live: Live = False,
    recipes: Recipes = (),
) -> int:
    """Show what a run would do and why, without doing it; for rented machines, also what it would cost in dollars.

    With --recipe, show instead what training these recipes by themselves would cost on the profile's machines.
    """
    from deployments.profile import chosen_profile
    from flows.registry import PHASES
    from fvlm_core.data.sources.sizes import missing_files, sources_table, too_large
    from tasks.grid import grid_table
    from tasks.grid import planned as planned_grid
    from tasks.plan import plan as planned
    from tasks.rented import local_view

    config = chosen_profile(profile, videos=videos, changes=changes)
    rental = config.machine.rental
    if recipes:
        _plan_recipes(recipes, config, volume.resolve(), live=live)
        return 0
    if sources := config.precompute.sources:
        table_console().print(sources_table(sources).terminal())
        if rental and (said := too_large(sources, rental.volume_gb)):
            print(said)
        if not rental and (missing := {source.name: paths for source in sources if (paths := missing_files(source))}):
            print("The steps can be planned once the sources' files are there. Missing:")
            print(
                "\n".join(f"  {name}: {paths[0]}" + (f" and {len(paths) - 1} more" if paths[1:] else "") for name, paths in missing.items())
            )
            return 0
    phases = list(PHASES.values())
    there = (local_view(rental) if rental else None) or volume.resolve()
    made = planned(phases, config, there)
    table_console().print(made.table().terminal())
    shards = volume.resolve() / "shards"
    table_console().print(grid_table(planned_grid(config.grid, {}, shards if shards.exists() else None)).terminal())
    if rental:
        from tasks.dollars import in_dollars
        from tasks.rented import at_live_prices

        rental = at_live_prices(config) if live else rental
        table_console().print(in_dollars(made, phases, rental).table().terminal())
    return 0


def _plan_recipes(files: Sequence[Path], config: "PipelineConfig", volume: Path, *, live: bool) -> None:
    from fvlm_core.config import Recipe
    from tasks.dollars import recipes_in_dollars
    from tasks.plan import plan_recipes
    from tasks.rented import at_live_prices, local_view

    rental = config.machine.rental
    there = (local_view(rental) if rental else None) or volume
    made = plan_recipes([Recipe.from_yaml(file) for file in files], config, there)
    table_console().print(made.table().terminal())
    if rental:
        rental = at_live_prices(config) if live else rental
        table_console().print(recipes_in_dollars(made, rental).table().terminal())


@app.command
def status(*, profile: Profile = "laptop", videos: Videos = None, volume: Volume = DEFAULT_VOLUME, changes: Changes = ()) -> int:
    """Show the progress of the phases on a volume, and the results of finished ones; needs no server.

    The volume of rented machines is read through S3 if it is not mounted.
    """
    from deployments.profile import chosen_profile
    from deployments.status import print_results, status_table
    from flows.registry import PHASES
    from tasks.rented import local_view

    config = chosen_profile(profile, videos=videos, changes=changes)
    rental, phases, console = config.machine.rental, list(PHASES.values()), table_console()
    seen = local_view(rental) if rental else None
    console.print(status_table(phases, config, seen or volume.resolve()).terminal())
    print_results(phases, config, seen or volume.resolve(), console, away=bool(rental and seen and str(seen) != rental.mount_path))
    return 0


@app.command
def adopt(
    step: str,
    folder: Path,
    /,
    *,
    profile: Profile = "laptop",
    videos: Videos = None,
    volume: Volume = DEFAULT_VOLUME,
    changes: Changes = (),
) -> int:
    """Adopt a finished result from elsewhere as a step's result, after checking that it is what the step would produce.

    Parameters
    ----------
    step
        Name of the step, e.g. `stage1`; `fvlm plan` lists them.
    folder
        Folder of the finished result, with its manifest.json.
    """
    from deployments.profile import chosen_profile
    from flows.registry import PHASES
    from tasks.adopt import adopt as adopted
    from tasks.plan import inspect_steps

    config = chosen_profile(profile, videos=videos, changes=changes)
    steps = {one.step.name: one.step for one in inspect_steps(list(PHASES.values()), config, volume.resolve())}
    if step not in steps:
        raise UserError(f"there is no step {step!r}", where=f"the profile {config.name}", fix=f"use one of {', '.join(steps)}")
    made = adopted(steps[step], folder.resolve(), volume.resolve())
    Console().print(f"{step}: adopted as {made.folder}", highlight=False, markup=False)
    return 0


@app.command
def recipe(
    stage: str,
    /,
    *,
    output: Path,
    shards: Path,
    init_from: Path | None = None,
    profile: Profile = "laptop",
    changes: Changes = (),
) -> int:
    """Print the recipe of a stage, for training it by itself: torchrun -m fvlm_core.train RECIPE.yaml

    Parameters
    ----------
    stage
        Name of the stage in the profile, e.g. `stage1`.
    output
        Folder of the run.
    shards
        Folder of the shards. `VOLUME/shards` is a link to the newest that a pipeline run made; the recipe names the folder behind it.
    init_from
        Folder of the run whose model it starts from.
    """
    import yaml

    from deployments.profile import chosen_profile
    from tasks.recipes import stage_recipe

    config = chosen_profile(profile, changes=changes)
    if stage not in config.stages.present:
        known = ", ".join(config.stages.present)
        raise UserError(f"there is no stage {stage!r}", where=f"the profile {config.name}", fix=f"use one of {known}")
    if shards.is_symlink():  # a later pipeline run moves the link, and the run could not resume
        shards = shards.resolve()
    places = {"output": str(output), "shards": str(shards), "init_from": str(init_from) if init_from else None}
    made = stage_recipe(config.model, config.base, config.stages, stage, changes={}, start=False).with_changes(places)
    print(yaml.safe_dump(made.model_dump(mode="json"), sort_keys=False), end="")
    return 0


@app.command
def deploy(*, profile: Profile = "laptop", volume: Volume = DEFAULT_VOLUME) -> int:
    """Register the work pools and all deployments of a profile on the server at PREFECT_API_URL.

    If the profile's machines are rented, this checkout is uploaded to their volume and runs there: deploy again after a change of the code.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url or (problem := problem_with(url)):
        what = f"{url!r} is no server's address: {problem}" if url else "no Prefect server is named"
        raise UserError(what, where="PREFECT_API_URL", fix="set it to the server's, e.g. http://127.0.0.1:4200/api")
    os.environ["PREFECT_SERVER_EPHEMERAL_ENABLED"] = "false"
    from deployments.profile import chosen_profile

    config = chosen_profile(profile)
    require_access(url, os.environ)
    from deployments import remote
    from deployments.register import FLOWS
    from infra.runpod.code import upload_code
    from tasks.rented import account_of

    rental = config.machine.rental
    code = upload_code(REPOSITORY, account_of(rental).store) if rental else None
    deployed = remote.deploy(config, volume.absolute(), code)
    Console().print("\n".join(f"{name}/{deployed}" for name in FLOWS), highlight=False)
    return 0


@app.command
def stop(*, volume: Volume = DEFAULT_VOLUME) -> int:
    """Stop the server, the workers and the runs of a volume."""
    if known_volume_id(volume) is None:
        raise UserError("no fvlm command has run on this volume", where=str(volume.absolute()), fix="give the --volume that was used")
    ended = Stack(volume, environment=os.environ).stop()
    print(f"ended: {', '.join(ended)}" if ended else "nothing of this volume was running")
    return 0


def main() -> None:
    """Entry point; prints errors that a user can act on without a traceback."""
    collect_rarely()  # most of what a command needs is imported after this
    if set(sys.argv[1:2]) <= {"--help", "-h"}:
        for name in app:
            app[name]  # imports the command, for its line in the list of commands
    try:
        sys.exit(app())
    except (UserError, StackError, InfraError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR if isinstance(error, UserError | StackRefusedError | RefusedError) else 1)
    except httpx.HTTPError as error:
        print(f"error: the Prefect server failed: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
