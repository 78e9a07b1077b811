"""What to cite where a feature is used: PETSc prints it at the end of a run with -citations.

Nothing here needs PETSc before `cite` is called, which only the rooms of Firedrake do.
"""

import petsctools

__all__ = ["cite"]

_ENTRIES = {
    "Dasgupta2025": """
@article{Dasgupta2025,
  author = {Dasgupta, Agnimitra and da Cunha, Alexsander Marciano and Fardisi, Ali and Aminy, Mehrnegar and Binder,
            Brianna and Shaddy, Bryan and Oberai, Assad A.},
  title = {Unifying and extending Diffusion Models through PDEs for solving Inverse Problems},
  journal = {Computer Methods in Applied Mechanics and Engineering},
  year = {2025},
  note = {arXiv:2504.07437}
}""",
    "Lindgren2011": """
@article{Lindgren2011,
  author = {Lindgren, Finn and Rue, H{\\aa}vard and Lindstr{\\"o}m, Johan},
  title = {An explicit link between {G}aussian fields and {G}aussian {M}arkov random fields: the stochastic partial
           differential equation approach},
  journal = {Journal of the Royal Statistical Society: Series B},
  volume = {73}, number = {4}, pages = {423--498}, year = {2011},
  doi = {10.1111/j.1467-9868.2011.00777.x}
}""",
    "Neal2011": """
@incollection{Neal2011,
  author = {Neal, Radford M.},
  title = {{MCMC} using {H}amiltonian dynamics},
  booktitle = {Handbook of {M}arkov Chain {M}onte {C}arlo},
  publisher = {Chapman and Hall/CRC}, year = {2011}
}""",
    "RudolfSprungk2018": """
@article{RudolfSprungk2018,
  author = {Rudolf, Daniel and Sprungk, Bj{\\"o}rn},
  title = {On a generalization of the preconditioned {C}rank-{N}icolson {M}etropolis algorithm},
  journal = {Foundations of Computational Mathematics},
  volume = {18}, pages = {309--343}, year = {2018}
}""",
    "Vehtari2021": """
@article{Vehtari2021,
  author = {Vehtari, Aki and Gelman, Andrew and Simpson, Daniel and Carpenter, Bob and B{\\"u}rkner, Paul-Christian},
  title = {Rank-normalization, folding, and localization: an improved {R}-hat for assessing convergence of {MCMC}},
  journal = {Bayesian Analysis},
  volume = {16}, number = {2}, pages = {667--718}, year = {2021}
}""",
    "Vehtari2024": """
@article{Vehtari2024,
  author = {Vehtari, Aki and Simpson, Daniel and Gelman, Andrew and Yao, Yuling and Gabry, Jonah},
  title = {{P}areto smoothed importance sampling},
  journal = {Journal of Machine Learning Research},
  volume = {25}, number = {72}, pages = {1--58}, year = {2024}
}""",
    "Talts2018": """
@misc{Talts2018,
  author = {Talts, Sean and Betancourt, Michael and Simpson, Daniel and Vehtari, Aki and Gelman, Andrew},
  title = {Validating {B}ayesian inference algorithms with simulation-based calibration},
  year = {2018}, note = {arXiv:1804.06788}
}""",
}
for _key, _entry in _ENTRIES.items():
    petsctools.add_citation(f"fem_diffusion:{_key}", _entry)


def cite(*keys: str) -> None:
    """Register what a feature that is used rests on; KeyError for a key that is not listed here."""
    for key in keys:
        petsctools.cite(f"fem_diffusion:{key}")
