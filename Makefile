# Everything is `make <target>`; each target first brings up the environment it needs (scripts/install.sh).
#
# Variables: PYTHON       an interpreter of 3.11 or later; if it has Firedrake already, it is used and no .venv is built
#            TORCH_INDEX  where pip takes torch from (PyTorch's CPU index saves a few GB)
#            TESTS        what `make test` and `make test-slow` run (default: tests)
#            JOBS         how many files of serial tests run side by side (default: 2)

DEMO ?= $(RUN) demos/boundary_flux/boundary_flux.py
TESTS ?= tests
JOBS ?= 2
# Rooms that need neither Firedrake nor MPI, then small finite element problems with few kernels to compile.
QUICK_TESTS = tests/diffusion tests/comparison tests/trust tests/test_checks.py tests/test_progress.py tests/test_house.py \
              tests/observation/test_observation.py tests/prior/test_product.py tests/reference/test_reference.py

# Evaluated when a recipe uses it, that is, after `install`.
RUN = $(shell scripts/install.sh --which)

export PYTHON TORCH_INDEX
# One thread a process: PETSc, BLAS and torch otherwise fight over the cores, and MPI ranks all the more.
export OMP_NUM_THREADS ?= 1
# Open MPI (4 and 5): allow root (containers), more ranks than cores, and no cross-memory attach, which containers forbid.
export OMPI_ALLOW_RUN_AS_ROOT = 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM = 1
export OMPI_MCA_rmaps_base_oversubscribe = 1
# Ranks that wait give way to ranks that work: without it three ranks on two cores crawl.
export OMPI_MCA_mpi_yield_when_idle = 1
export PRTE_MCA_rmaps_default_mapping_policy = :oversubscribe
export OMPI_MCA_btl_vader_single_copy_mechanism = none

.PHONY: help install demo demo-sensors demo-release demo-monitor demo-logistic demo-stokes demo-elastic demo-heat \
        demo-membrane demo-rates demo-field \
        demo-pde test \
        test-quick test-slow \
        lint clean benchmark benchmark-forward benchmark-formulations benchmark-networks benchmark-collapse \
        benchmark-defaults benchmark-ensemble benchmark-solves benchmark-peers benchmark-ablation

help:
	@echo "make demo            infer the flux through a boundary from a few sensors, start to end"
	@echo "make demo-sensors    one model for any set of sensors: layouts it has never seen"
	@echo "make demo-release    where was a contaminant released in a town? checked on 200 unseen cases"
	@echo "make demo-monitor    a live page for the operators of that town: a day of readings at speed"
	@echo "make demo-logistic   any Firedrake solver: unknown source of a nonlinear reaction-diffusion equation"
	@echo "make demo-rates      a field, two rates and the noise, all unknown at once, against Hamiltonian Monte Carlo"
	@echo "make demo-field      from a logger's file to an answer: gaps, units, a drifting and a broken gauge, unknown noise"
	@echo "make demo-stokes     any Firedrake solver: unknown inflow of a Stokes flow, velocity probes"
	@echo "make demo-elastic    any Firedrake solver: unknown stiffness inside, displacements of the surface"
	@echo "make demo-heat       can I trust it? a nonlinear conductivity problem, checked and corrected by its own solver"
	@echo "make demo-membrane   a published benchmark, 64 unknowns: trained, corrected, against a reference"
	@echo "make demo-pde        diffusion models solved as PDEs for the density, forward and back"
	@echo "make test            lint and all tests but the slow ones, on one and on several MPI ranks"
	@echo "make test-quick      those of the rooms of torch alone, and a few of finite elements: two minutes"
	@echo "make test-slow       the slow tests"
	@echo "make install         only the environment: .venv with PETSc, Firedrake and torch"
	@echo "make lint            flake8, and pyright on the package"
	@echo "make benchmark               all ratios of speed in one table, and scaling to a million unknowns (QUICK=1: small)"
	@echo "make benchmark-forward       blocks of samples against loops over solvers, steady and transient"
	@echo "make benchmark-formulations  formulations, samplers and evaluations on known posteriors (QUICK=1: fewer)"
	@echo "make benchmark-networks      fully connected network against layers on the mesh (after demo-release)"
	@echo "make benchmark-collapse      does long training shrink the posterior?"
	@echo "make benchmark-defaults      is a default of training tuned to one problem? hours (QUICK=1: minutes)"
	@echo "make benchmark-ensemble      pairs a second of two ensemble members against one"
	@echo "make benchmark-solves        errors against the number of solves, with derivatives and without (QUICK=1: fewer)"
	@echo "make benchmark-peers         side by side with sbi, overnight, in an environment of its own (QUICK=1: minutes)"
	@echo "make benchmark-ablation      parts of the default call, each on and off, on six problems (QUICK=1: fewer)"
	@echo "make clean           remove what tests, demos and builds left (.venv stays)"

install:
	@scripts/install.sh

demo: install
	$(DEMO)

demo-sensors: install
	$(RUN) demos/many_sensors/many_sensors.py

demo-pde: install
	$(RUN) demos/diffusion_as_pde/diffusion_as_pde.py

demo-logistic: install
	$(RUN) demos/logistic_reaction/logistic_reaction.py

demo-rates: install
	$(RUN) demos/unknown_rates/unknown_rates.py

demo-field: install
	$(RUN) demos/field_readings/field_readings.py

demo-stokes: install
	$(RUN) demos/stokes_inflow/stokes_inflow.py

demo-elastic: install
	$(RUN) demos/elastic_stiffness/elastic_stiffness.py

demo-heat: install
	$(RUN) demos/heat_conduction/heat_conduction.py

demo-membrane: install
	$(RUN) demos/membrane/membrane.py

demo-release: install
	$(RUN) demos/source_release/source_release.py

demo-monitor: install
	$(RUN) demos/source_release/operators.py

# Files of serial tests side by side. Status 5: there are none.
in_files = $(RUN) -m pytest -m "not slow and parallel[1]" -n $(JOBS) --dist loadfile $(1) || [ $$? -eq 5 ]
# All tests for a number of ranks in one launch, as it takes longer to start Firedrake on each than to run most of them;
# and alone, because ranks that share their cores with other tests crawl.
on_ranks = mpiexec -n $(1) $(RUN) -m pytest -m "not slow and parallel[$(1)]" $(TESTS) || [ $$? -eq 5 ]

test: lint
	$(call in_files,$(TESTS))
	$(call on_ranks,2)
	$(call on_ranks,3)

test-quick: install
	$(call in_files,$(QUICK_TESTS))

# Through the environment, because mpi-pytest hands its options to the MPI processes it starts this way only.
test-slow: install
	PYTEST_ADDOPTS="-m slow -o faulthandler_timeout=0" $(RUN) -m pytest $(TESTS)

lint: install
	$(RUN) -m flake8
	$(RUN) -m pyright --pythonpath "$$($(RUN) -c 'import sys; print(sys.executable)')"

# An hour or more; QUICK=1 tries it at small sizes and leaves the page as it is.
benchmark: install
	$(RUN) benchmarks/performance.py $(if $(QUICK),--quick --out benchmarks/output/performance.md)

benchmark-formulations: install
	$(RUN) benchmarks/formulations.py --size $(if $(QUICK),quick,full)

benchmark-forward: install
	$(RUN) benchmarks/forward.py
	$(RUN) benchmarks/residuals.py
	$(RUN) benchmarks/transient.py

benchmark-networks: install
	$(RUN) benchmarks/field_network.py

benchmark-defaults: install
	$(RUN) benchmarks/defaults.py $(if $(QUICK),--quick)

benchmark-collapse: install
	$(RUN) benchmarks/collapse.py

benchmark-ensemble: install
	mpiexec -n 2 $(RUN) benchmarks/ensemble.py

benchmark-solves: install
	$(RUN) benchmarks/solves.py $(if $(QUICK),--quick)

benchmark-peers:
	@scripts/install_peers.sh
	.venv-peers/bin/python benchmarks/peers.py $(if $(QUICK),--quick)

benchmark-ablation: install
	$(RUN) benchmarks/ablation.py $(if $(QUICK),--quick)

clean:
	rm -rf build dist *.egg-info .pytest_cache demos/*/output benchmarks/output
	find . -name __pycache__ -not -path "./.venv*" -prune -exec rm -rf {} +
