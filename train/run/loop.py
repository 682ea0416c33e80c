"""The training loop, the same for both frameworks: `Run.train` tells it from top to bottom.

It owns steps, logging, the cadence of validation, checkpoints and samples, early stopping and resuming. Models and
optimizers are behind `Backend`, text behind `Data`; this file knows neither torch nor jax.

A run folder:

    settings.toml             every setting, as `--config` reads it
    tokenizer.json            and what else belongs to the data
    training.logs             what the console showed
    metrics.jsonl             one JSON object a step, validation, sample
    checkpoints/step_1000     whole training states; the last one is step_final_10100
    best/step_2500            the one with the best validation loss
    deepseek_final.*          the final weights alone
    plot.png                  curves, drawn when the run ends
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext, suppress
from pathlib import Path

from torch_ref.spec.interface import Backend, StepResult, UserError
from torch_ref.spec.leaving import no_room
from torch_ref.spec.storage import write_whole
from train.data.corpus import DataError
from train.data.feed import Data
from train.data.options import HELD_OUT
from train.data.packing import Batch
from train.plot import plot_runs
from train.run import endings
from train.run.clock import Clock
from train.run.endings import Ending
from train.run.lr_finder import find_learning_rate
from train.run.measures import BegunStep, step_measures
from train.run.options import Options
from train.run.origin import Origin, put_at_origin
from train.run.overview import overview, phase_line, require_disk
from train.run.progress import Progress
from train.run.runlog import RunLog, SilentLog, heard, last_word
from train.run.saving import Saver
from train.run.scoring import score, validation_line
from train.run.signals import CLOSED_PIPE, Stop, StopSignals
from train.run.spikes import ROLLBACKS, diverged, good_step, in_words, roll_back
from train.run.together import Together
from train.run.tracing import Tracing
from train.shell import COMPLETE

FINAL_WEIGHTS = "deepseek_final"


class Run:
    """One start of a run: from seeded weights, from given ones, or from a checkpoint.

    Arguments: `write_weights(run_dir, backend)` writes the final weights in the framework's own format and returns
    their path; `automatic` names the settings that `auto` chose for this device; `started` is when the process
    began, by `time.monotonic`.
    """

    def __init__(
        self,
        options: Options,
        run_dir: Path,
        backend: Backend,
        data: Data,
        write_weights: Callable[[Path, Backend], Path],
        automatic: Sequence[str] = (),
        started: float | None = None,
    ) -> None:
        self.options = options
        self.clock = Clock(options, started)
        self.automatic = automatic
        self.writes = backend.processes.writes
        self.signals = StopSignals(self.writes)
        self.together = Together(backend, self.signals, self.clock)
        self.run_dir = run_dir
        self.backend = backend
        self.saver = Saver(backend, run_dir, options.keep_checkpoints, self.spared)
        self.data = data
        self.write_weights = write_weights
        self.progress = Progress()
        self.saved_step: int | None = None
        self.begun: BegunStep | None = None
        """The step that the device may still be at, and nothing was said of yet."""
        self.step_ended = 0.0
        """When the last one ended, by `time.perf_counter`."""
        self.origin: Origin
        self.log: RunLog

    def train(self) -> int:
        """Train to the end, or until something stops it; returns the exit code. Whatever stopped it, the run can be
        started again and goes on from its latest checkpoint."""
        with heard() as before_the_log:
            self.begin()
        if self.complete:
            passed_over = self.origin.passed_over
            print(f"The run is complete: {self.outcome}. Nothing is left to do in {self.run_dir}{passed_over}.")
            return COMPLETE

        with self.open_log() as self.log, self.signals:
            for message in before_the_log:
                self.log.warn(message)
            self.introduce()
            try:
                if self.options.find_lr and self.step == 0:
                    self.adopt_learning_rate()
                self._announce_phase()  # with the rate that was found
                traced = self.options.profiled() if self.writes else range(0)
                tracing = Tracing(self.backend, self.run_dir / "profile", traced, self.log.say)
                with closing(self.data.batches(self.progress.cursor)) as stream, tracing:
                    batches = self.together.ahead(stream)
                    self.log.show_progress(self.step)
                    if self.saved_step is None and self.step == self.progress.rolled_back_at > 0:
                        self.save()
                    self.pay_what_is_owed()
                    while not self.finished:
                        tracing.before_step()
                        self.train_step(batches)
                        tracing.after_step()
                        self.saver.announce(self.log.say)
                        if self.validation_due:
                            self.progress.owed.append("validation")
                        if self.due(self.options.sample_interval):
                            self.progress.owed.append("sample")
                        self.pay_what_is_owed()
                        self.together.agree(bool(self.log.unread))
                        # Either writes the step's checkpoint itself, once: Flax removes one before it writes it anew.
                        if self.progress.skipped_in_a_row >= self.options.max_skipped_steps:
                            return self.stop_diverged()
                        if self.progress.rollbacks > ROLLBACKS and not self.finished:
                            return self.stop_spiking()
                        # Last: a run that goes on from this checkpoint says nothing of the step again.
                        if self.save_due:
                            self.save()
                        if self.together.wishes.unread:
                            return self.stop_interrupted(CLOSED_PIPE, f"since its output {self.log.unread}")
                        if self.together.stop_number and not self.finished:
                            return self.stop_interrupted(self.together.stop_number)
                        if self.together.wishes.no_data and not self.finished:
                            return self.stop_without_data(self.together.data_error)
                        if self.together.wishes.time_is_up and not self.finished:
                            return self.stop_in_time()
            except Stop:
                return self.stop_interrupted(self.together.stop_number)
            except DataError as error:
                return self.stop_without_data(error)
            except (UserError, RuntimeError, MemoryError) as error:
                if isinstance(error, UserError) or no_room(error):
                    with suppress(UserError):  # the disk may be full
                        self.log.end(self.step, "failed")
                raise
            return self.finish()

    def open_log(self) -> RunLog:
        if not self.writes:
            return SilentLog()
        return RunLog(self.run_dir, self.step, self.options, self.progress.owed)

    @property
    def step(self) -> int:
        """Optimizer steps done, skipped ones included."""
        return self.backend.steps_done

    @property
    def finished(self) -> bool:
        return self.step >= self.options.total_steps or self.stopped_early

    @property
    def complete(self) -> bool:
        """Whether nothing is left to do. That the final weights are there does not say so: they may be those of a
        shorter run, which was then extended; the log's last word is said after they were written."""
        if not (self.finished and self.saved_step == self.step and any(self.run_dir.glob(f"{FINAL_WEIGHTS}.*"))):
            return False
        return last_word(self.run_dir) == endings.complete(self.outcome).state

    @property
    def stopped_early(self) -> bool:
        return 0 < self.options.patience <= self.progress.stale_validations

    @property
    def save_due(self) -> bool:
        asked_for = self.due(self.options.checkpoint_interval) or self.together.wishes.save
        ends_a_phase = self.step in (self.options.steps, self.options.stable_steps)
        rolled_back = self.step == self.progress.rolled_back_at
        return asked_for or ends_a_phase or rolled_back or self.finished

    def due(self, interval: int) -> bool:
        return interval > 0 and self.step % interval == 0

    @property
    def validation_due(self) -> bool:
        """Every `eval_interval` steps, and at the end of a run that is longer than that."""
        return (
            self.due(self.options.eval_interval)
            or self.step == self.options.total_steps > self.options.eval_interval > 0
        )

    # ------------------------------------------------------------------------------------------------------- begin

    def begin(self) -> None:
        """Put weights, optimizer and progress where the run starts."""
        self.origin = put_at_origin(self.backend, self.data, self.options, self.run_dir, self.automatic)
        self.progress, self.saved_step = self.origin.progress, self.origin.saved_step
        self._use_learning_rate(self.origin.learning_rate)

    def introduce(self) -> None:
        """Say what will be trained, on what and where, and how much disk the checkpoints take."""
        if not self.writes:
            return
        require_disk(self.options, self.run_dir)
        self._write_settings()
        self.data.keep_scored()
        for change in self.origin.changes:
            self.log.warn(f"changed since the checkpoint: {change}")
        self.log.say(overview(self.options, self.backend, self.data, self.run_dir))
        self.log.say(self.origin.said)

    def _write_settings(self) -> None:
        """What `auto` chose for this device stays `auto`: the file may be read on another."""
        asked = dataclasses.replace(self.options, **dict.fromkeys(self.automatic, "auto"))
        write_whole(self.run_dir / "settings.toml", asked.to_toml().encode())

    def _announce_phase(self) -> None:
        if self.step < self.options.total_steps:
            self.log.say(phase_line(self.options, self.step))

    def adopt_learning_rate(self) -> None:
        """Sweep the learning rate from where the run stands, and use the rate that is suggested. Raises `Stop` on a
        signal."""
        picture = self.run_dir / "lr_finder.png" if self.writes else None
        rate = find_learning_rate(self.backend, self.data, picture, self.log.say, self.together.interrupted)
        if rate is None:
            raise Stop
        self._use_learning_rate(rate)
        if self.writes:
            self._write_settings()

    def _use_learning_rate(self, rate: float) -> None:
        self.options = dataclasses.replace(self.options, learning_rate=rate)
        self.backend.set_schedule(self.options.schedule)

    # ------------------------------------------------------------------------------------------------- one step

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Take the next batch, update the weights, and take note of the step: on a device that runs ahead of the host,
        while it is at the next step."""
        started = time.perf_counter()
        with self.signals.interruptible() if self.together.alone else nullcontext():
            batch = next(batches)
        waited = time.perf_counter() - started
        result = self.backend.begin_step(batch.inputs, batch.targets)
        self.catch_up()
        self.begun = BegunStep(self.step, batch.cursor, self.data.bad_rows, started, waited, result)
        if not self.may_run_ahead:
            self.catch_up()

    @property
    def may_run_ahead(self) -> bool:
        """Whether the next step can begin without this one's result: whatever that is, it will not stop the run or take
        it back. Nor may a trace hold parts of other steps."""
        decides = (
            self.progress.skipped_in_a_row + 1 >= self.options.max_skipped_steps
            or self.progress.spikes_in_a_row + 1 >= self.options.spike_steps
        )
        traced = {self.step, self.step + 1}.intersection(self.options.profiled())
        return self.backend.runs_ahead and not (decides or traced or self.finished)

    def catch_up(self) -> None:
        """Wait for the step that was begun, if there is one, and take note of it: all that is said or saved of a step
        needs that."""
        if self.begun is None:
            return
        begun, self.begun = self.begun, None
        result = begun.result()
        ended = time.perf_counter()
        # A step that was begun early has run since the one before it ended.
        seconds = ended - max(begun.started, self.step_ended)
        self.step_ended = ended

        self.progress.stepped(begun.cursor, result)
        self._log_step(begun, result, seconds)
        self.heed_spike(result.loss)
        if begun.step == self.options.steps:
            self._announce_phase()

    def _log_step(self, begun: BegunStep, result: StepResult, seconds: float) -> None:
        self.log.step(*step_measures(self.options, self.backend, begun, result, self.progress, seconds))
        if not result.applied:
            self.log.warn(
                f"step {begun.step} updated nothing: loss {result.loss} or gradient norm {result.grad_norm} is not "
                f"finite ({self.progress.skipped_in_a_row} in a row, at {self.options.max_skipped_steps} the run stops)"
            )

    @property
    def good_step(self) -> int:
        """The step of the checkpoint to roll back to; 0 if there is none."""
        known = self.step - (self.begun is not None)  # the step under way has no loss yet
        return good_step(self.progress, known, self.options.checkpoint_interval)

    def heed_spike(self, loss: float) -> None:
        """Warn of a run that diverges, and roll it back if that was asked for; the step then ends with a checkpoint."""
        median = diverged(self.progress, loss, self.options)
        if median is None:
            return
        good, begun = self.good_step, self.step - self.progress.spikes_in_a_row + 1
        rolled_back = False
        if self.options.spike_action == "rollback":
            self.saver.settle(self.log.say)
            rolled_back = roll_back(self.backend, self.saver.folder, good, self.progress)
        values = {"step": self.step, "loss": loss, "median": median, "begun": begun}
        self.log.spike(values | {"rolled_back_to": good if rolled_back else None})
        self.log.warn(in_words(values, self.options, good if rolled_back else None))

    # --------------------------------------------------------------------------- validation, checkpoints, samples

    def pay_what_is_owed(self) -> None:
        """Validation and sample of this step. Raises `Stop` on a signal; what was not done then stays owed."""
        was_finished = self.finished
        while self.progress.owed:
            self.catch_up()
            {"validation": self.validate, "sample": self.sample}[self.progress.owed[0]]()
            del self.progress.owed[0]
        if self.finished and not was_finished:
            self.saved_step = None  # a checkpoint of this step, which a signal left, does not know that it is the last

    def heed_signals(self, *_: object) -> None:
        """Raises `Stop` if a signal has come to any process, unless the run is at its end anyway."""
        if self.together.interrupted() and self.step < self.options.total_steps:
            raise Stop

    def validate(self) -> None:
        """Loss on the held-out rows and on each validation dataset; keep the state if it is the best so far by the
        first of them."""
        better: bool | None = None
        # All are scored before any is taken note of: a signal in between leaves the validation undone as a whole.
        rows = self.options.rows_per_pass * self.options.devices
        held_out = self.data.validations.items()
        scores = {name: score(self.backend, part, rows, self.heed_signals) for name, part in held_out}
        for name, values in scores.items():
            loss = values["loss"]
            values = {"step": self.step, **({} if name == HELD_OUT else {"dataset": name}), **values}
            verdict = ""
            if better is None:
                better = self.progress.validated(self.step, loss, self.options.min_delta)
                values["best_step"] = self.progress.best_step
                values["stale_validations"] = self.progress.stale_validations
                verdict = " (the best so far)" if better else f" (the best was at step {self.progress.best_step})"
            self.log.validation(values, validation_line(values) + verdict)
        if better:
            # It is saved in the middle of a validation that is then done.
            self.saver.keep_best(self._meta(owed=[]))

    def save(self) -> None:
        """Begin a checkpoint of this step, unless there is one. It may land while training goes on."""
        self.catch_up()
        if self.saved_step == self.step:
            return
        name = f"step_final_{self.step}" if self.finished else f"step_{self.step}"
        self.saver.begin(name, self._meta(), self.log.say)
        self.saved_step = self.step
        self.clock.saved()

    def _meta(self, **progress: object) -> dict:
        """What a checkpoint holds besides the backend's state."""
        return {
            "step": self.step,
            "loss": self.progress.loss,
            "framework": self.backend.framework,
            "options": self.options.to_dict(),
            "automatic": list(self.automatic),
            "data": self.data.identity,
            "judged_by": self.data.judged_by,
            "progress": dataclasses.asdict(self.progress) | progress,
        }

    def spared(self) -> tuple[int | None, ...]:
        """Steps whose checkpoints do not make room: from one the run can be extended, to one it may roll back."""
        rolls_back = self.options.spike_action == "rollback"
        return self.options.stable_steps, self.good_step if rolls_back else None

    def sample(self) -> None:
        """Let the model continue the prompt, with random numbers that belong to this sample alone."""
        tokenizer = self.data.tokenizer
        positions = self.options.model.max_position
        prompt = (tokenizer.encode(self.options.prompt) or [tokenizer.eot_id])[: positions - 1]
        room = positions - len(prompt)
        sampling = self.options.sampling(tokenizer.eot_id)
        sampling = dataclasses.replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        seed = self.options.seed + self.step
        if self.together.alone:
            tokens = self.backend.generate(prompt, sampling, seed, self.heed_signals)
        else:
            # Only the one that writes is at work: it asks the others when it has done.
            tokens = self.backend.generate(prompt, sampling, seed)
            self.heed_signals()
        self.log.sample(self.step, self.options.prompt, tokenizer.decode_after(prompt, tokens))

    # ------------------------------------------------------------------------------------------------- endings

    def finish(self) -> int:
        """The run is complete: final weights and curves."""
        self.save()
        self.saver.settle(self.log.say)
        path = self.write_weights(self.run_dir, self.backend)
        self.log.say(f"Final weights saved to: {path}")
        return self._end(endings.complete(self.outcome))

    @property
    def outcome(self) -> str:
        validation = ""
        if self.progress.best_loss is not None:
            validation = f", best validation loss {self.progress.best_loss:.4f} at step {self.progress.best_step}"
        if self.stopped_early:
            stale = self.progress.stale_validations
            return f"stopped early at step {self.step}, after {stale} validations without a better one{validation}"
        return f"{self.step} steps{validation}"

    def stop_interrupted(self, number: int, why: str | None = None) -> int:
        if self.step:
            self.save()
        return self._end(endings.interrupted(self.step, number, why))

    def stop_in_time(self) -> int:
        self.save()
        return self._end(endings.time_is_up(self.step, self.options.max_minutes))

    def stop_diverged(self) -> int:
        """The weights are still those of the last good step."""
        skipped = self.progress.skipped_in_a_row
        self.progress.skipped_in_a_row = 0  # a resumed run may try as many again
        self.save()
        return self._end(endings.not_finite(self.step, skipped))

    def stop_spiking(self) -> int:
        self.progress.rollbacks = 0  # a resumed run may try as many again
        self.save()
        return self._end(endings.spiking(self.step))

    def stop_without_data(self, error: DataError | None) -> int:
        if self.step:
            self.save()
        return self._end(endings.without_data(self.step, error))

    def _end(self, ending: Ending) -> int:
        self.saver.settle(self.log.say)
        self.log.end(self.step, ending.state)
        self.log.say(ending.message)
        if self.step and self.writes:
            try:
                picture = plot_runs([self.run_dir], self.run_dir / "plot.png")
                self.log.say(f"Curves drawn to: {picture}")
            except UserError as error:  # the run ended as it did
                self.log.warn(f"no curves are drawn: {error}")
        return ending.code
