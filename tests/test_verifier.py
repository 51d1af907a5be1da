r"""The verifier's policy, rule by rule, what is right and what is wrong, in a few seconds:

    python -m pytest tests/test_verifier.py
    GOLDS_DIR=my/jsonl python -m pytest tests/test_verifier.py    # also the golds of files there

RIGHT and WRONG hold cases "given == gold" under each rule of the policy, with three or more spaces
between two cases; the test puts the given answer into a \boxed{}. GOLDS holds answers in the
notations of public data sets; each equals itself and no other. fuzz_verifier.py mutates all cases.
"""
import builtins
import doctest
import gc
import inspect
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest

from common import answers_equal, extract_answer, grade

RIGHT = [(line, *pair.split(" == ")) for line, pairs in {
    "unevaluated or unsimplified": r"""
        (9+1) == 10    \sqrt{12} == 2\sqrt3    2^{10} == 1024    \frac{2}{4} == \frac12
        3\cdot 4 + 1 == 13    \frac{\sqrt{2}}{2} == \frac{1}{\sqrt 2}
        \frac{1+\sqrt5}{2} == \frac{\sqrt5+1}{2}    \sqrt{3+2\sqrt2} == 1+\sqrt2
        \frac{\sqrt{\sqrt{11}+4}}{15+2\sqrt{33}} == \frac{\sqrt{4+\sqrt{11}}}{2\sqrt{33}+15}
        (\sqrt2)^2 - 2 == 0    \sqrt[3]{-8} == -2    \sqrt[3]{27} == 3
        \frac{1}{1+\frac{1}{2}} == \frac23    2^6 * 3^5 * 5^4 == 2^6 3^5 5^4
        \left|-5\right| == 5    8^{2/3} == 4    4^{-1} == 0.25    |3-5| == 2
        2|x| + |y-1| == |1-y|+|2x|    2^5+1 = 33 == 33    2^{3} 3^{2} == 72""",
    "fractions in every notation": r"""
        \frac43 == 4/3    \dfrac{4}{3} == \frac43    \tfrac43 == \frac{4}{3}    \cfrac{4}{3} == 4/3
        \frac 59 == \frac{5}{9}    \frac9{19} == \frac{9}{19}    \frac{270}7 == 270/7
        14/3 == \frac{14}{3}    -\frac{10}{9} == \frac{-10}{9}    \frac{-3}{8} == -\frac{3}{8}
        \frac94\pi == \frac{9}{4}\pi    \frac{\pi}6 == \pi/6    ½ == 0.5    3½ == 7/2
        {243 \over 625} == \frac{243}{625}    243 \over 625 == \frac{243}{625}
        {1 \over {2 \over 3}} == \frac32    {{1 \over 2} \over 3} == \frac16    3{1 \over 2} == 3.5
        {x^{2}+1 \over y_{1}} == \frac{x^2+1}{y_1}    ({1 \over 2}, 3) == (\frac12, 3)
        x = {-1 \pm \sqrt{5} \over 2} == \frac{-1\pm\sqrt5}{2}""",
    "exact decimals": r"""
        1.25 == 5/4    5.0 == 5    .5 == \frac12    .35625 == 0.35625
        0.0000672 == 6.72 \times 10^{-5}    33. == 33    0.\overline{3} == \frac13
        0.1\overline{6} == 1/6    0.\dot{3} == 1/3    .\overline{142857} == 1/7
        3.\overline{12} == 103/33    0.\overline{9} == 1""",
    "leading zeros and signs": r"""
        033 == 33    33 == 033    +33 == 33    -0 == 0    000 == 0    −7 == -7""",
    "scientific notation": r"""
        1.5\times10^{-3} == 0.0015    1.5e-3 == 0.0015    1.5 \cdot 10^{3} == 1500
        2.5 x 10^{3} == 2500    6.02×10²³ == 6.02\times 10^{23}
        3 \times 10^8 \text{ m/s} == 3e8""",
    "units, currency, degrees, percent": r"""
        15 == 15\mbox{ cm}^2    15\text{ cm}^2 == 15    864 \mbox{ inches}^2 == 864    10 cm == 10
        10 m == 10    10 m. == 10    x = 5\text{ m} == 5    10 weeks == 10    10 square units == 10
        125\textnormal{ miles} == 125    9.8\ \mathrm{~m/s^2} == 9.8
        9.8 \text{ m}/\text{s}^2 == 9.8    \frac{1}{3} \textbf{meters} == 1/3
        5.4 \text{ cents} == 5.4    5\text{ V} == 5    \$36 == 36    36 == \$36    \$18.90 == 18.9
        €5 == 5    12 dollars == \$12    336^\circ == 336    336 == 336^{\circ}    336° == 336
        \frac{270}7\text{ degrees} == \frac{270}{7}    28\% == 28    28 == 28\%
        28 percent == 28\%    28\text{ percent} == 28    5x \text{ dollars} == 5x
        (2\text{ m}, 3\text{ m}) == (2,3)    1000.99m^2 == 1000.99    9.8m/s^2 == 9.8
        28 pct == 28\%    98.6^\circ\text{F} == 98.6    33 ft/s == 33
        33\,\text{kg}\cdot\text{m/s}^2 == 33    33\ \mathrm{kg\,m^2\,s^{-2}} == 33
        33 \text{ N}\cdot\text{m} == 33    33¢ == 33""",
    "units in other words": r"""
        20\% == 20\% \text{ loss}    20 \text{ percent loss} == 20\% \text{ loss}
        5 m == 5 \text{ metres}    5 \text{ cm} == 5 \text{ centimeters}    5 dollars == \$5
        5 \text{ kilometers per hour} == 5 \text{ km/h}    60 km/h == 60 \text{ kph}
        60 \text{ mph} == 60 \text{ miles per hour}    28 pct == 28\%    \$5.00 == \$5
        5\text{ cm}^2 == 5 \text{ square cm}    5\text{ sq. cm} == 5 cm^2
        5\text{ ft}^3 == 5 \text{ cubic feet}    5\text{ cm²} == 5\text{ cm}^{2}
        864 \mbox{ inches}^2 == 864 \text{ in}^2    3 hours == 3 \text{ hrs}
        1 \text{ hour} == 1 \text{ hours}    4 boxes == 4 \text{ Box}    30^\circ == 30 degrees
        30^\circ C == 30 \text{ degrees Celsius}    30^\circ\text{C} == 30^\circ
        6:00 AM == 6:00 \text{ a.m.}    \text{6:00 PM} == 6:00 pm    6:00 PM == 6:00
        \$5 \text{ million} == 5 million    \$3\frac12 == 3.5    -\$5 == -5    £5 == 5
        2\text{ m}, 3\text{ m} == 3\text{ m}, 2\text{ m}
        4 \text{ students in total} == 4 students
        33 \text{ kg m/s}^2 == 33\,\text{kg}\cdot\text{m/s}^2
        9.8m/s^2 == 9.8 \text{ m}/\text{s}^2
        10\%, 20\% == 20\%, 10\%    33\frac13\% \approx 33.3\% == 100/3    \$12x == 12x""",
    "lists and sets": r"""
        -2,1 == 1,-2    1, -2 == -2,1    1 \text{ and } -2 == -2,1    2, 3, and 5 == 5,3,2
        2 or 3 == 2,3    x=2 \text{ or } x=3 == 2,3    x = 2, 3 == 3,2    \{1,2\} == \{2,1\}
        \{1,2\} == 1,2    \left\{1, 2\right\} == \{2,1\}
        \{1\pm\sqrt{5},-2\} == \{-2, 1-\sqrt5, 1+\sqrt5\}    \{0.5\} == 1/2
        12 and 13 == 12\text{ and }13    x=1, y=2 == x=1, y=2    (1,2), (3,4) == (3,4),(1,2)
        \{(1,2),(3,4)\} == (3,4),(1,2)    \emptyset == \varnothing    \{\} == \emptyset
        19, 46, \text{ and } 82 == 19, 46, and 82
        (1,2) or (3,4) == (3,4),(1,2)    x_1=2,\quadx_2=3 == 3,2    2,2,3 == 3, \sqrt4, 2
        \{2,2,3\} == 2,3    x=2, x=2, x=3 == 2,3,2    \pm 1, 2 == 1, -1, 2""",
    "runs of capitals": r"""
        BDAC == \text{BDAC}    B D A C == bdac    TTFF == ttff    TF, FT == FT, TF
        T, F, T, F == (T,F,T,F)    A, C, D == ACD    A,C,D == D, C and A    x = BDAC == BDAC
        AB = 5 == 5    AB = CD == CD = AB    AB + CD == CD + BA    AB \cdot CD == CD\cdot AB
        2AB == 2BA    \frac{GM}{R} == \frac{MG}{R}    \sqrt{LC} == \sqrt{CL}    PV = nRT == nRT = PV
        A = LW == LW    {BDAC} == (BDAC)    xyz == zyx    \pi RH == \pi HR""",
    "tuples": r"""
        (1,2) == \left( 1, 2 \right)    (1,-16,-4,43) == (1,-16,-4,43)
        (0.5, \frac{9}{2}) == (\frac12, 4.5)    \left( 3, \frac{\pi}{2} \right) == (3,\pi/2)
        (1,2,3) == (1.0,2.0,3.0)    \langle 1,2\rangle == (1,2)""",
    "intervals, unions, membership, inequality": r"""
        x \in [-2,7] == [-2,7]    -2 \le x \le 7 == x \in [-2,7]    -2<=x<=7 == [-2,7]
        7 \ge x \geq -2 == [-2,7]    2<=x<5 == [2,5)    x \geq 5 == [5,\infty)
        5 \leq x == x >= 5    x < 3 == (-\infty,3)    \left\{x \mid x > 5\right\} == (5,\infty)
        x > 5 == (5,∞)    (5, infty) == (5,∞)    x \ne 3 == x\neq3
        x<-1 or x>2 == (-\infty,-1)\cup(2,\infty)
        (2,\infty)\cup(-\infty,-1) == (-\infty,-1)\cup(2,\infty)
        (0,9) \cup (9,36) == (9,36)\cup(0,9)    \{-1\}\cup[0,7) == [0,7)\cup\{-1\}
        \mathbb{R} == (-\infty,\infty)
        [-1, -\tfrac12) \cup (-\tfrac12, 0) == [-1,-0.5)\cup(-0.5,0)
        \left(\frac{3}{5},\frac{8}{3}\right] == (0.6,\frac{8}{3}]
        (-\sqrt{3}, \sqrt{3}) == -\sqrt3 < x < \sqrt3    f(2) < f(1) < f(4) == f(4) > f(1) > f(2)
        x \neq 3 == (-\infty,3)\cup(3,\infty)    x != 3 == x \ne 3
        \mathbb{R}\setminus\{3\} == (-\infty,3)\cup(3,\infty)    \mathbb{R} - \{3\} == x \ne 3
        0<f(x)<1 == (0,1)    1<x<2 or 3<x<4 == (1,2)\cup(3,4)
        x \in (1,2) or x \in (3,4) == (1,2)\cup(3,4)    x \in (1,2) \cup (3,4) == (1,2)\cup(3,4)
        (-\infty,-1), (2,\infty) == (-\infty,-1)\cup(2,\infty)
        \{x \in \mathbb{R} \mid x > 2\} == (2,\infty)    {(0,1)\cup(2,3)} == (0,1)\cup(2,3)""",
    "matrices": r"""
        \begin{bmatrix} 1 & 0 \\ 0 & 1 \end{bmatrix} == \begin{pmatrix}1&0\\0&1\end{pmatrix}
        \left[\begin{array}{cc}1&2\\3&4\end{array}\right] == \begin{pmatrix}1&2\\3&4\end{pmatrix}
        \begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix} == \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
        \frac15\begin{pmatrix} 1 \\ -18 \end{pmatrix} == \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}
        \begin{pmatrix} 1 \\ 2 \\ \end{pmatrix} == \begin{matrix} 1 \\ 2 \end{matrix}
        \mathbf{v} = \begin{pmatrix}1\\2\end{pmatrix} == \begin{pmatrix}1\\2\end{pmatrix}
        \mathbf{A}^{-1} = \begin{pmatrix}1&2\end{pmatrix} == \begin{pmatrix}1&2\end{pmatrix}
        \begin{array}x&y\end{array} = \begin{array}1&2\end{array} == \begin{matrix}1&2\end{matrix}
        \begin{pmatrix}1\\-\sin x\\\end{pmatrix} == \begin{pmatrix}1\\-\sin x\end{pmatrix}""",
    "bases": r"""
        204_5 == 204_{5}    4210_{5} == 4210_5    204_{\text{base }5} == 204_5
        2516 \text{ base } 8 == 2516_8    204_{\text{five}} == 204_5    1010_{two} == 1010_2
        2516 base eight == 2516_8    twelve == 12    (52)_8 == 52_8    (1011)_{2} == 1011_2
        (52)_{\text{eight}} == 52_8    \left(52\right)_8 == 52_{8}    (A3)_{16} == A3_{16}""",
    "mixed numbers": r"""
        1\frac{4}{5} == 1.8    137 \frac{1}{2} == 137.5    3 1/2 == 3.5    -1\frac45 == -1.8
        2\frac58 == 2.625""",
    "plus-minus": r"""
        1 \pm \sqrt{19} == 1+\sqrt{19}, 1-\sqrt{19}    \pm 3 == 3,-3
        3 \pm 2 \sqrt{2} == 3+2\sqrt2, 3-2\sqrt2
        \frac{-1\pm\sqrt5}{2} == \frac{-1-\sqrt5}{2},\frac{-1+\sqrt5}{2}    x = \pm 3 == \pm 3""",
    "left-hand sides": r"""
        x=5 == 5    5 == x=5    x = 5 == x=5    f(x) = 2x+3 == 2x+3    y = 2x + 3 == 2x+3
        2x+3 == y = 2x + 3    (x,y) = (1,2) == (1,2)    x \in \{1,2\} == 1,2    a_1 = 7 == 7
        P(A) = \frac12 == 1/2    \angle ABC = 30^\circ == 30    \text{Area} = 12 == 12
        f^{-1}(x) = x+1 == x+1    AB = 5 == 5    \frac{dy}{dx} = 2x == 2x
        x = \frac13 \approx 0.333 == \frac13    \{x,y\}=\{1,2\} == \{2,1\}
        x = 5+5+1 = 11 == x = 11    x = 3 + 3 = 6 == x = 2\cdot 3    S_{ABC}:S=7:32 == 7:32
        AB:CD = 3:4 == 3:4    \frac{NO}{BO}=\frac12 == \frac12    x=1, y=2 == (1,2)
        a = 2 \text{ and } b = 3 == (a,b)=(2,3)    \overline{AB} = 5 == 5
        m\angle A = 30^\circ == 30    (x,y) \in \{(1,2),(3,4)\} == (1,2),(3,4)
        \boldsymbol{\theta} = 3 == 3    \mathbf{x}_1 = 5 == 5    \vec{v} = (1,2) == (1,2)
        n \in \{1,3\} == n=1 \text{ or } n=3    f(x)=x \text{ and } f(x)=-x == f(x)=\pm x""",
    "equations in several variables": r"""
        5x - 7y + 11z + 4 = 0 == -5x+7y-11z-4=0    10x - 14y + 22z + 8 = 0 == 5x - 7y + 11z + 4 = 0
        y=-\frac{1}{2}x+\frac{3}{4} == 2x+4y-3=0    x^2/4 + y^2/3 = 1 == x^2/16 + y^2/12 = 1/4
        2x - y + 3 = 0 == y = 2x+3    x^2+y^2 = 1 == y^2 = 1-x^2""",
    "expressions with letters": r"""
        (a+5)(b+2) == ab+2a+5b+10    \frac{x+2}{7} == \frac{x}{7}+\frac{2}{7}
        x^3+3x-6 == 3x + x^3 - 6    \frac{8-7x}{6} == 4/3-7x/6
        11z^{7}(5+11z^{7}) == 11z^7(11z^7+5)    \frac{\pi r}{h+r} == \pi r/(r+h)
        2^{n+1} == 2\cdot 2^n    \frac{1}{3\sqrt[3]{x}^2} == \frac{1}{3x^{2/3}}
        \left(x-2\right)\left(x+2\right) == x^2-4    x_1 + x_2 == x_{2}+x_{1}    (n+1)! == (n+1)n!
        \frac{8x^2}{9(x^2-2)^{5/3}} == \frac{8x^2}{9(x^2-2)\sqrt[3]{x^2-2}^2}
        \sqrt{x}\sqrt{y} == \sqrt{xy}    \sqrt{1-x^2} == \sqrt{(1-x)(1+x)}
        5y''+y' == y^{\prime}+5y^{\prime\prime}    \theta^2 == θ²
        \binom{n}{2} == \frac{n(n-1)}{2}    \frac{mg}{k} == \frac{m g}{k}
        \lfloor n/2\rfloor+n == n+\lfloor n/2\rfloor""",
    "complex numbers": r"""
        3+4i == 4i+3    i(2-i) == 1+2i    \frac{1+i}{2} == \frac12+\frac{i}{2}
        6+9i == 3(2+3i)""",
    "functions and constants": r"""
        \sin\frac{\pi}{6} == 1/2    \cos 60^\circ == 1/2    \sin(90^\circ - x) == \cos x
        \tan^2(y)+1 == \sec^2(y)    \cot x == \frac{\cos x}{\sin x}    \sec x == \frac1{\cos x}
        2 \sin b \cos a == 2\cos a\sin b    \ln 8 == 3\ln 2    \log_2 8 == 3    e^{2} == e \cdot e
        1-\frac{1}{\mathrm{e}} == 1-e^{-1}    \arctan 1 == \pi/4    \lfloor 3.7 \rfloor == 3
        \lceil 3.2\rceil == 4    \left\lfloor \frac{n}{2} \right\rfloor == \lfloor n/2\rfloor
        \binom{5}{2} == 10    {5 \choose 2} == 10    12\pi cm == 12\pi    5! == 120
        \frac{1}{2004!} == \frac{1}{2004!}    2017^{2016} == 2017 \cdot 2017^{2015}
        \sqrt{66} == √66    2π == 2\pi    -\infty == -∞    \frac{n!}{2} == \frac12 n!
        \binom{2n}{n} == \frac{(2n)!}{n!^2}    \binom{n}{k} == \binom{n}{n-k}
        \frac{\lambda^k e^{-\lambda}}{k!} == e^{-\lambda}\frac{\lambda^k}{k!}
        |-\frac12| == 0.5
        \binom{2023}{1000} == \binom{2023}{1023}    \frac{2024!}{2022!} == 2024 \cdot 2023""",
    "thousands separators": r"""
        10,000 == 10000    10{,}000 == 10000    10\,000 == 10000    10,\!080 == 10080
        11,\! 111,\! 111,\! 100 == 11111111100    7,425,000 == 7425000    1 000 == 1000
        1,000.99 == 1000.99    \$32,\!348 == 32348    (10,\!000, 2) == (10000,2)""",
    "text and choices": r"""
        \text{Evelyn} == Evelyn    evelyn == \text{Evelyn}    \text{(B)} == B    (B) == \text{(B)}
        B == (B)    \textbf{(C)} == \text{C}    \text{E}. == E    b == \text{(B)}
        \text{east} == \text{East}    \text{No} == no    \text{no solution} == No solution
        June 5 == \text{June 5}    12:00 == 12:00    3:4 == 3 : 4
        x + \sum_{k=1}^{n} k == x+\sum_{k=1}^{n}k    \text{(B) } 12 == B    \text{(B) } 12 == 12
        \textbf{(B)}\ 12 == \text{(B)}    \textbf{(C) }\frac{3}{4} == 0.75    B. 12 == B
        C) 12 == 12    \text{(C) Plane} == \text{(C)}    (C) Plane == C    C. Plane == \text{(C)}
        \text{C. Plane} == C    C: Plane == C    \textbf{(E)}\ \text{none of these} == E
        \text{(C) Plane} == \text{plane}    (D) a circle with radius 5 == D    (C) x^2+1 == (C)
        \text{The answer is } 33 == 33    the value of x is 33 == 33
        \textbf{(Evelyn)} == \text{Evelyn}    \text{no real solutions} == \text{No real solutions.}
        \sum_{k=1}^{n} k^2 == \sum_{k=1}^n k^2    \sum_{k=1}^{n}k^{2} == \sum_{k=1}^n k^2""",
    "markup around an answer": r"""
        $33$ == 33    33 == $33$    33 == \boxed{33}    \(33\) == 33    \left(33\right) == 33
        {33} == 33    \mathbf{33} == 33    33\, == 33    \displaystyle\frac12 == 1/2
        \\frac{1}{2} == \frac12""",
}.items() for pair in re.split(r"\s{3,}", pairs.strip())]

WRONG = [(line, *pair.split(" == ")) for line, pairs in {
    "other values": r"""
        34 == 33    336 == 33    33 == 336    4 == 4\sqrt{2}    4\sqrt2 == 4
        2 == \frac{1+\sqrt5}{2}    -5 == 5    \frac{3}{14} == \frac{14}{3}    2^{98} == 2^{99}
        \frac{1}{2^{99}} == \frac{1}{2^{98}}    \frac{1}{2006!} == \frac{1}{2004!}
        {243 \over 625} == \frac{625}{243}    {1 \over 0} == 0
        4 == \frac{34}{16}+\frac{\sqrt{1358}}{16}    \frac651 == \frac65""",
    "no tolerance": r"""
        0.333 == 1/3    0.3333333333333333 == \frac13    3.14159 == \pi    1.414 == \sqrt2
        0.8660254037844386 == \frac{\sqrt3}{2}
        1.41421356237309504880168872420969807856967187537694 == \sqrt2    33.3 == 100/3
        0 == 10^{-30}    10^{-60}\pi == 10^{-61}\pi    \sqrt2+10^{-100} == \sqrt2
        1+e^{-500} == 1    16386.16 == 16386.17    0.\overline{35} == 0.\overline{53}
        0.\overline{33} == 0.33""",
    "percent is not a factor": r"""
        0.28 == 28\%    28 == 0.28    \frac{28}{100} == 28    0.1 == 10\%
        90^\circ == \frac{\pi}{2}""",
    "letters are no units": r"""
        5 == 5x    5x == 5    2 == 2k    3 == 3R^2    33n == 33    x m == x
        2x^2\text{ m} == 2x^2    33 or more == 33    at least 33 == 33    not 33 == 33
        3 million == 3    2 dozen == 2    two thirds == 2    2 thirds == 2    twenty five == 5
        3 == 3m^2    5m == 5    33 wrong == 33    33 factorial == 33    33 thousandths == 33
        33 tenths == 33    3mg == 3    5\text{ m}\cdot x == 5""",
    "two units": r"""
        20\% \text{ loss} == 20\% \text{ gain}    5\text{ m} == 5\text{ cm}    5 m == 5 s
        6:00 AM == 6:00 PM    6:00 a.m. == 6:00 p.m.    6\text{ AM} == 6\text{ PM}    \$5 == 5\%
        5 cm^2 == 5 cm^3    5¢ == \$5    5\text{ cm} == 5\text{ cm}^2    5 km/h == 5 m/s
        9.8\text{ m/s} == 9.8 \text{ m/s}^2    30^\circ C == 30^\circ F    30^\circ == 30 cm
        30^\circ\text{C} == 30^\circ\text{F}    3 hours == 3 minutes    5\text{ m} == 5\text{ miles}
        5\text{ m} == 5\text{ minutes}    5 mm == 5 \text{ m}    \$5 == 5 \text{ cents}
        3 \text{ red marbles} == 3 \text{ blue marbles}    5 \text{ square feet} == 5 \text{ feet}
        5 \text{ kg} == 5 \text{ g}    5 \text{ N} == 5 \text{ N}\cdot\text{m}
        2\text{ m}, 3\text{ cm} == 2\text{ cm}, 3\text{ m}    5 miles == 5 \text{ miles per hour}
        5 \text{ kg} == 5 \text{ kg}\cdot\text{m/s}^2    10 units == 10 \text{ square units}
        \frac12\text{ hour} == \frac12\text{ minute}    7 \text{ sons} == 7 \text{ daughters}
        x = 5 m == 5\text{ cm}    30° == 30\%    \$5 == €5""",
    "runs of capitals have an order": r"""
        ABCD == BDAC    TTFF == TFTF    T T F F == T F T F    TF == FT    ACGT == TGCA    IV == VI
        AB == BA    \text{TTFF} == TFTF    TTFF, TFTF == FTFT, TTFF    T, T, F, F == T, F, T, F
        True, False, True == True, True, False    x = BDAC == ABCD    (TF, FT) == (FT, TF)
        {ABCD} == {BDAC}    A > B > C == A > C > B    A, B == ABC    C, A, B, A == A, C, A, B""",
    "lists keep their counts": r"""
        2,3 == 2,2,3    2,2,3 == 2,3    2,2,3 == 2,3,3    1 and 1 == 1    \sqrt4, 2, 3 == 2, 3
        x = 1, x = 1, x = 2 == 1, 2    (1,2), (1,2) == (1,2)    x, x, y == x, y
        2 \text{ and } 2 \text{ and } 3 == 2, 3""",
    "lists, sets and tuples": r"""
        1,2 == 1,3    1,2,3 == 1,2    1,2 == 1,2,3    1 == 1,2    (2,1) == (1,2)
        (1,2,3) == (1,3,2)    (1,2) == \{1,2\}    (3,1) == 1,3    1,2,3,... == 1,2,3
        (1,2),(3,4) == (1,2),(4,3)    x=1, y=2 == x=2, y=1    \{1,2\} == 3    32, 349 == 32349
        \pm 2 == 2    2 == \pm 2    \pm 3 == 3, -2    33, 33 == 33    33 == 33, 33""",
    "intervals": r"""
        (0,1) == (0,1.5)    [0,9) == [0,1)    [0,9) == (0,9)    (2,5) == [2,5)    x > 5 == x \geq 5
        x<5 == x>5    (0,1)\cup(1,2) == (0,2)    (0,\frac{2}{\sqrt2})\cup(\sqrt2,2) == (0,2)
        (0,\sqrt3)\cup(\frac{3}{\sqrt3},2) == (0,2)    (2,0)\cup(3,4) == [0,2]\cup(3,4)
        [0,2]\setminus(1,3) == [0,1)    |x| > 1 == x \ne 1    \pm 1 < x < 2 == -1 < x < 2
        (0,1)\cup(2,3) == (0,1)    [-2,7] == -2<x\le 7    (-\infty,5) == (-\infty,5]
        (0.6,2.6667] == (\frac{3}{5},\frac{8}{3}]    x \ne 3 == 3    (0,2) \cup (2,3) == (0,3)
        x \neq 3 == \mathbb{R}\setminus\{4\}    |x| > 1 == (1,\infty)    |x| < 1 == -1 \le x \le 1
        -x > -1 == x > 1    |x| < 1 == x < 1    [0,2]\setminus\{1\} == [0,2]""",
    "matrices": r"""
        \begin{pmatrix}1 & 2 \\ 3 & 5\end{pmatrix} == \begin{pmatrix}1 & 2 \\ 3 & 4\end{pmatrix}
        \begin{pmatrix}1 & 2\end{pmatrix} == \begin{pmatrix}1 \\ 2\end{pmatrix}
        \begin{pmatrix}1\\2\\3\end{pmatrix} == \begin{pmatrix}1 \\ 2\end{pmatrix}
        \begin{cases} 33 \\ 34 \end{cases} == 33
        \begin{array}1\\2\end{array}+\begin{array}5&6\end{array} == \begin{array}6\\8\end{array}""",
    "bases need digits and base": r"""
        204 == 204_5    54 == 204_5    204_5 == 204    204_6 == 204_5    214_5 == 204_5
        1010_{\text{two}} == 1010_3    1010_{\text{two}} == 1010    1010_{\text{two}} == 10
        2516 base seven == 2516 base eight    2516 base eight == 2516    (52)_8 == 52
        (52)_8 == 52_7    (52)_8 == 25_8""",
    "mixed numbers are not products": r"""
        3\frac12 == \frac32    \frac{3}{2} == 3\frac{1}{2}    3 1/2 == 3/2    11 6/6 == 12
        2 3/2 == 4 5/3    2 3 == 6    4 4/0 == 4""",
    "left-hand sides and equations": r"""
        x=5 == 6    x=5 == y=5    a_1=5 == a_2=5    0 == a+3z=0    a+3z=0 == 0    1 == 2x+z=1
        11a+c == 7=11a+c    5x - 7y + 11z + 4 = 0 == 5x - 7y + 11z - 4 = 0    y = 2x+3 == y = 2x-3
        x^2+y^2=1 == x^2-y^2=1    x-x=y-y == x+y=2    2x = 10 == 5    34 = 33 == 33
        33 = 34 == 33    x^2 = 4 == x = 2    x = 5+5+1 = 12 == x = 11    7:32 == 32:7    7:32 == 7
        y=2, x=1 == (1,2)    x=1, x=2 == (1,2)    x^2+y^2=25\infty == x^2+y^2=25
        \mathbf{v} = (1,2) == (1,3)    \mathbf{v} = (1,2) == \mathbf{w} = (1,2)
        2\mathbf{v} = (1,2) == (1,2)
        \overline{AB} = 5 == 6    (x,y) \in \{(1,2),(4,3)\} == (1,2),(3,4)    mx = 5 == 5
        n!=120 == n \neq 120    x=1, y=3 == (1,2)""",
    "letters": r"""
        (+5)(b+2) == (a+5)(b+2)    x+1 == x+2n+1    x+y == x-y    \sin x == \cos x    R^2 == r^2
        R^2 \text{ cm} == r^2 \text{ cm}    N == n    x^{12} == x^{1}2    y' == y''
        \frac{x}{y} == \frac{y}{x}    x_1 == x_2    f(x) = 2x == 3x    \sqrt{x^2} == x
        \lfloor n/4\rfloor == \lfloor n/3\rfloor    \lfloor n/2\rfloor == n/2
        \lceil n/2\rceil == \lfloor n/2\rfloor    \overline{AB} == \overline{AC}
        \binom{n}{k} == \binom{n}{k+1}    n! == (n+1)!    \binom{n}{2} == \frac{n(n+1)}{2}""",
    "text": r"""
        \text{Navin} == \text{Evelyn}    (C) == (B)    odd == even
        All integers == All real numbers    A student == A teacher
        No real solution == No solution    A or B == B    A. or B == A    A: B == A    A, B == B
        (A)(B) == B    1:00 == 12:00    east == west    \textbf{(A)}\ 12 == \text{(B)}
        (B) 12 == (C) 12    (B) 12 or (C) 13 == B    (B) 12, 13 == 12    the answer is not 33 == 33
        (A) 5, (B) 6 == A    (A), (B) 6 == A    A) 12 B == A    \text{(C) Plane} == \text{(B)}
        \text{(C) Plane} == \text{Plate}    (C) Plane == (B) Plane    (B) is wrong == B
        (B) maybe (C) == B    (C) not == C    \text{(A) is not correct} == A""",
    "several values, conditions, uncertain answers": r"""
        33, 34 == 33    33 or 34 == 33    34 \text{ or } 33 == 33    33 \text{ and } 34 == 33
        33; 34 == 33    [33, 34] == 33    (32, 34) == 33    32 < x < 34 == 33    33 + n == 33
        33x == 33    x == 33    33 \pm 1 == 33    33 + 0x == 33    \{33, 34\} == 33
        33 = 34 == 33    33/34 == 33    \begin{cases}33 & x>0\\ 34\end{cases} == 33    33 34 == 33
        1 maybe 33 == 33    33 maybe 1 == 33    1\text{ hour }20\text{ minutes} == 20
        33 (or 34) == 33    33 if x>0 == 33    33? == 33    \approx 33, 34 == 33""",
    "right, but not recognised": r"""
        \frac{1}{3} \approx \frac{33}{100} == 1/3    2x < 6 == x < 3    0.333\ldots == 1/3
        6:8 == 3:4""",
    "refused": r"""
        0.\overline{3} == 0.\overline{5}    0.\overline{3} == 0    \bar{x} == \bar{y}    |x| == x
        |x+1| == x+1    \lfloor x \rfloor == x    3.7 == \lfloor 3.7 \rfloor    33 = x < 34 == 34
        4 = x < 5 == 5    10^{-7000}\pi == 10^{-7001}\pi    0 == 10^{-400}\pi
        x<-1 or x>3 == (-\infty,-1)\cup(2,\infty)
        \begin{pmatrix}1&2\\3&4\end{pmatrix} == \begin{pmatrix}1&2&3&4\end{pmatrix}
        1, 2, 3, 4 == \begin{pmatrix}1&2&3&4\end{pmatrix}    \frac{9.8\text{ m}}{2} == 9.8
        3\text{ ft }4\text{ in} == 3    33 or == 33    33\text{ or so} == 33
        33\text{ and counting} == 33    3 + 1 4 == 7    --1 4 == 4    2*3 4 == 24
        10 cm^{2}\pi == 10\pi    \frac{14}\text{ m}{3} == \frac{14}{3}    33 and == 33
        33 \cup == 33    1 cm.8 == 1.8    3\text{ m}x == 3x    1 maybe 33 == 1 maye 33
        (1 or 2) == (1,2)    910^{-400}\pi == 10^{-400}\pi    \frac{1}{2004!}\pi == \frac{1}{2004!}
        1/0 == 0    \frac{0}{0} == 0    \sum_{k=0}^{n-2} F_k == \sum_{k=0}^{n-1} F_k
        9^{9^{9^9}} == 9    \  == 0    --- == 0    (1/2)! == \sqrt\pi    (-1)! == 1
        \sum_{k=1}^{n} k^2 == \sum_{k=1}^n k^3    70 (or 71) == 70    (3)3 == 9
        1\frac{4}{5}1 == 1\frac{4}{5}    \frac{10}{11}1 == \frac{10}{11}""",
}.items() for pair in re.split(r"\s{3,}", pairs.strip())]

RESPONSES = [(verdict, *case) for verdict, cases in {  # (response, gold)
    "correct": [
        (r"so $\boxed{33}$.", "33"), (r"\boxed{33.}", "33"), ("\\boxed{\n33\n}", "33"),
        (r"\boxed {33}", "33"), (r"\boxed{$33$}", "33"), (r"\fbox{33}", "33"),
        (r"\boxed{\boxed{33}}", "33"), (r"first \boxed{1}, in the end \boxed{33}", "33"),
        (r"\boxed{\frac{1}{2}} and then \boxed{5", r"\frac12"),
        (r"\boxed{12 $ and $13 }", r"12\text{ and }13"),
        (r"x \in \boxed{\{-1\} \cup [0,7)}.", r"\{-1\} \cup [0,7)"),
        (r"\boxed{-2} \quad \text{and} \quad \boxed{1}", "1,-2"),
        (r"$\boxed{1}$ and $\boxed{-2}$", "1,-2"), (r"\boxed{1}, \boxed{-2}", "1,-2"),
        (r"\boxed{1}; \boxed{-2}", "1,-2"), (r"\boxed{1} or \boxed{-2}", "1,-2"),
        (r"\boxed{1}\boxed{2}", "1,2"), (r"$x = \boxed{1}$ and $y = \boxed{2}$", "1,2"),
        (r"\boxed{1} \text{ for part (a) and } \boxed{2}", "1,2"),
        (r"\boxed{1} papers and \boxed{2} bins", "1,2"), (r"\boxed 33", "33"),
        (r"It goes into \boxed form. Answer: 33", "33"), (r"\boxed{33\ }", "33"),
        (r"\boxed{\color{red}{33}}", "33"), (r"\boxed{\hspace{1mm}\bf 33}", "33"),
        (r"\boxed{\mbox{\text{(B)}}}", "B"), (r"\boxed{\text{Answer: }x^2+1}", "x^2+1"),
        ("__Answer:__ 33</s>", "33"), ("Answer: x<3", "(-\\infty,3)"), (r"\boxed -3.5.", "-3.5"),
        (r"**\boxed{1}** and **\boxed{2}**", "1,2"),
        ("<think>\\boxed{1}</think>\\boxed{33}", "33"),
        ("thoughts \\boxed{1}</think>\\boxed{33}", "33"), ("**Answer:** 33", "33"),
        ("**Answer**: 33", "33"), ("Answer: 33.", "33"), ("Answer: 33", "033"),
        ("Answer: \\[ 33 \\]", "33"), ("Answer:\n\\[\n33\n\\]", "33"), ("Answer: $33$", "33"),
        ("Answer: $$\n33\n$$", "33"), ("Answer: \\( 33 \\)", "33"), ("Answer: **33**", "33"),
        ("### Final Answer: 33", "33"), ("ANSWER: x = 33", "33"),
        ("Answer: 1\nno:\nAnswer: 33\n", "33"),
        ("Final Answer: The final answer is $33$. I hope it is correct.", "33"),
        ("The answer is: 33.", "33"), (r"\boxed{\text{C}}", r"\text{(C)}"),
        ("**Answer: 33**", "33"), ("**Final Answer:**\n\n33", "33"), ("Answer: `33`", "33"),
        ("Answer: 33<|im_end|>", "33"), ("Answer：33", "33"),
        ("Answer: 33\nHere is why: 34.", "33"), ("Put it in \\boxed. Answer: 33", "33"),
        ("Answer: B", r"\text{(B)}"), (r"\boxed{" + "(" * 20 + "33" + ")" * 20 + "}", "33"),
        (r"\boxed{33}, \boxed{33}", "33"), (r"\boxed{33}. I put it in \boxed{} as asked.", "33"),
        (r"\boxed{33}, in the form \boxed{...}.", "33"), (r"\boxed{33}; \boxed{\ldots}", "33"),
        (r"\boxed{33} is in \boxed{answer}.", "33"), (r"\boxed{33} \boxed{ } \boxed{?}", "33"),
        (r"\boxed{33} for $\boxed{\text{your answer}}$", "33"), (r"\boxed{33} or \boxed{}", "33"),
        (r"\boxed{33}: \boxed{[your\_final\_answer]}", "33"), ("\\boxed{}: Answer: 33", "33"),
        (r"not \boxed{34} but \boxed{A}", "A"), (r"\boxed{34}. No: \boxed{\{\}}", r"\emptyset"),
        (r"\boxed{34}. \boxed{\text{no solution}}", "no solution"),
        (r"\boxed{34}. Wait, that is wrong. It is \boxed{33}", "33"),
        (r"\boxed{34}. Wait, maybe that is wrong: \boxed{33}", "33"),
        ("\\boxed{34}.\nMaybe I should check.\nSo \\boxed{33}", "33"),
        (r"\boxed{\frac34} or equivalently \boxed{0.75}", "3/4"),
        (r"\boxed{33}, maybe \boxed{33}", "33")],
    "wrong": [
        (r"\boxed{33}, so it is not \boxed{34}", "33"),
        (r"\boxed{34}. So $x=\boxed{35}$ and then \boxed{33}", "35, 33"),
        (r"\boxed{\text{33 is not }34}", "34"), (r"Answer: \boxed{33", "33"),
        ("Answer: not 33", "33"), (r"\boxed{3 3}", "33"), (r"\boxed{33 squared}", "33"),
        (r"\boxed{33, \ldots}", "33"), (r"\boxed{33 \pmod{34}}", "33"),
        (r"\boxed{(-2,1)}", "-2,1"), (r"\boxed{34}", "33"),
        (r"\boxed{33} no wait \boxed{34}", "33"), (r"\boxed{33}, \boxed{34}", "33"),
        (r"\boxed{34}, \boxed{33}, \boxed{33}", "33"), (r"\boxed{34} / \boxed{33}", "33"),
        (r"\boxed{34} \text{ or maybe } \boxed{33}", "33"), (r"\boxed{34}, Or \boxed{33}", "33"),
        (r"$\boxed{34}$, possibly $\boxed{33}$", "33"), (r"\boxed{34} (or \boxed{33})", "33"),
        (r"\boxed{34}. Or maybe it is \boxed{33}.", "33"),
        (r"either \boxed{34} or \boxed{33}", "33"), (r"\boxed{33}. \boxed{\infty}", "33"),
        (r"\boxed{34}, but it could also be \boxed{33}.", "33"),
        (r"\boxed{33} or \boxed{34}", "33"), ("Answer: 33 or 34", "33"),
        ("Answer: 33\nAnswer: 34", "33"), ("Answer: 33, no, 34", "33"),
        ("<think>\\boxed{33}</think>\\boxed{34}", "33")],
    "no_answer": [
        ("The answer is 33.", "33"), ("<think> so \\boxed{33}", "33"),
        ("<think> Answer: 33", "33"), ("<think>\\boxed{33}</think> done", "33"),
        ("<think>a</think><think>\\boxed{33}", "33"), (r"\boxed{33", "33"), (r"\boxed{}", "33"),
        (r"I put it in \boxed{answer}.", "33"), ("So it is 33", "33"), ("33", "33"), ("", "33")],
    "gave_up": [
        (r"\boxed{9^{9^{9^9}}}", "33"), (r"\boxed{3^{50000000}}", "33"), (r"\boxed{3000!}", "33"),
        (r"\boxed{" + "(" * 31 + "33" + ")" * 31 + "}", "33"),
        (r"\boxed{" + "3" * 2001 + "}", "33")],
}.items() for case in cases]

NORMALISED = [  # an example for each row of the table of notations: (given, result)
    (r"\\frac{1}{2}", r"\frac{1}{2}"), (r"x \in \mathbb{R}", "x ∈ (-∞,∞)"),
    (r"10{,}080; 32,\!348", "10080; 32348"), (r"0.1\overline{6}", "(0.1+6/9/10)"),
    (r"\(33\); \color{red}{33}", "33; {33}"), (r"$\$36$; 28\%; 10\,000", "36 ; 28 ; 10000"),
    ("The area of $x$ is 12", "12"), (r"\begin{pmatrix}1&2", "⟦ 1&2"), (r"3\\ \end{array}", "3 ⟧"),
    ("1.5e-3", "1.5*10^{-3}"), ("2, 3, and 5", "2, 3∨ 5"), (r"5\text{ V}", "5"),
    (r"\text{more}", '"more"'), (r"\text{(B)}", "(B)"), (r"3, \text{ and } 5", "3∨ 5"),
    (r"\dfrac\pi2 <= x", r"\fracπ2 ≤ x"), ("x\n + 1", "x + 1"),
    (r"\mathbb{R} - \{3\}", "(-∞,3)∪(3,∞)"), (r"75^{\circ}; 9^\circ C", "75°; 9°"),
    (r"\mathbf{v} = 6", "v = 6"), ("6:00 p.m.", "6:00"), (r"\text{(C) Plane}", '(C) "Plane"'),
    ("T, F, T", "(T, F, T)"), (r"(52) _{8}", "52_{8}"), (r"y^{\prime\prime}", "y''"),
    ("6 base 7", "6_7"), (r"\frac4{x}", r"\frac{4}{x}"),
    (r"\frac43", r"\frac{4}{3}"), (r"{5 \choose 3}", r"\binom{5 }{ 3}"),
    (r"{5 \over x}", r"\frac{5 }{ x}"),
    ("2.5 x 10^3", "2.5*10^3"), (r"\{x \mid x > 5\}", "x > 5"), ("|x|", r"\abs(x)"),
    (r"x = 1/3 \approx 0.33", "x = 1/3"), ("58,500; 1 000; (58,500)", "58500; 1000; (58,500)"),
    (r"3\frac12; 3½; 3 5/2", "(3+1/2); (3+1/2); ?3 5/2"), ("33. ", "33"),
    ("5 m/s; 0.99m^2", "5 m/s; 0.99"),
    (r"15\mbox{ cm}^2; 5x meters; 33 more", '15 ; 5x ; 33 "more"'),
]

GOLDS = r"""2k | 4.5 | \pi | x=5 | -2,1 | 40_9 | \$36 | 6+9i | 5r^5 | 3R^2 | 7\pi | 2k+2 | 3.21
    | 1.25 | 0.15 | 52_8 | p - q | (3,4] | 12\pi | (2,4) | 58,500 | 4343_6 | 6 - 5i | \cot x
    | .35625 | \frac43 | \frac14 | 3, 5, 7 | y = -2x | .0000672 | 75^\circ | 11\sqrt2 | 10,\!080
    | (-2,1) | x^3+3x-6 | \frac 59 | (15,-29) | 3\sqrt{13} | \text{(B)} | \text{(C)} | (2,\infty)
    | \text{east} | (a+5)(b+2) | \$32,\!348 | \text{even} | (-\infty, 0] | 1\frac{4}{5}
    | x \in [-2,7] | e^{-1}
    | \text{Evelyn} | 15\mbox{ cm}^2 | 1 \pm \sqrt{19} | 137 \frac{1}{2} | \frac{11+9a}{20}
    | 5.4 \text{ cents} | (0,9) \cup (9,36) | \frac{20000}{\pi} | \{1\pm\sqrt{5},-2\} | \frac{n!}{2}
    | 11,\! 111,\! 111,\! 100 | 5x - 7y + 11z + 4 = 0 | \frac{270}7\text{ degrees} | \binom{7}{3}
    | \begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} | \left\lfloor\frac{n}{2}\right\rfloor | \theta'
    | \begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix} | (1,8,19), (2,7,13), (4,5,7) | 2^{2007}-1
    | f(2) < f(1) < f(4) | \frac{dy}{dx} | 4.7 \times 10^{-3} | \arcsin{1.3 \sin{\theta_w}}
    | y'' + 2y' | \sum_{k=1}^{n} k^2 | 2,\ldots,n | \text{12:30 p.m.}""".split("|")

@pytest.mark.parametrize("line, given, gold", RIGHT)
def test_right(line, given, gold):
    assert grade(rf"so it is \boxed{{{given}}}.", gold) == "correct"
    assert answers_equal(given, gold)

@pytest.mark.parametrize("line, given, gold", WRONG)
def test_wrong(line, given, gold):
    assert grade(rf"so it is \boxed{{{given}}}.", gold) in ("wrong", "gave_up", "no_answer")
    assert not answers_equal(given, gold)

@pytest.mark.parametrize("verdict, response, gold", RESPONSES)
def test_where_the_answer_stands(verdict, response, gold):
    assert grade(response, gold) == verdict
    assert (extract_answer(response) is None) is (verdict == "no_answer")

def test_each_notation_is_normalised():
    normalise = sys.modules[grade.__module__]._normalise
    assert [(given, normalise(given)[0]) for given, _ in NORMALISED] == NORMALISED

def golds_from(folder):
    """Returns the `answer` fields of a folder of jsonl files."""
    lines = [line for file in sorted(pathlib.Path(folder).glob("*.jsonl"))
             for line in file.read_text().splitlines() if line.strip()]
    return [str(json.loads(line)["answer"]) for line in lines]

def check_golds(golds):
    """Checks that each gold equals itself, in a box and on an answer line.

    Returns the pairs of different texts that are found equal.
    """
    for gold in golds:
        for response in (rf"\boxed{{{gold}}}", rf"$$\boxed{{ {gold} }}.$$", f"Answer: ${gold}$",
                         f"**Answer:** {gold}."):
            assert grade(response, gold) == "correct", (response, gold)
    return [(a, b) for k, a in enumerate(golds) for b in golds[:k] if a != b and (
        answers_equal(a, b) or answers_equal(b, a))]

def test_every_gold_equals_itself_and_no_other():
    assert check_golds([gold.strip() for gold in GOLDS]) == []

@pytest.mark.skipif("GOLDS_DIR" not in os.environ, reason="GOLDS_DIR names no folder of jsonl")
def test_the_golds_of_a_folder():
    golds = golds_from(os.environ["GOLDS_DIR"])
    assert golds
    equal = check_golds(sorted(set(golds)))
    print(f"{len(golds)} golds; spellings found equal, to be read by eye (-s shows them): {equal}")

HOSTILE = [
    "9^{9^{9^{9^9}}}", "3^{50000000}", "10^{10^{10}}", "2^{-99999999}", "((10!)!)!",
    "99999999!", "e^{e^{e^{e}}}",
    "\\sqrt{" * 5000 + "2" + "}" * 5000, "(" * 100_000, "{" * 100_000 + "}" * 100_000,
    "\\frac{1}{" * 900 + "2" + "}" * 900, "-" * 1900 + "1", "1+" * 900 + "1", "9" * 1_000_000,
    "9" * 1900 + "^{9}", "1e999999999", "1e-999999999", "\\binom{1000000000}{500000000}",
    "x^{" * 300 + "2" + "}" * 300, "\\sin(10^{300})", "\\tan(\\pi/2)", "0^{-1}", "\\log 0",
    "\\infty-\\infty", "1^{\\infty}", "\x00" * 1000, "\u202e33", "\ud800", "\\boxed{" * 10_000,
    "\\boxed{1}," * 10_000, "|" * 500, "((x+1)^{99})^{99}", "2!" * 300, "1,000" * 300, "a_" * 500,
    "'" * 1500, "\\{" + ",".join("\\sqrt{%d}" % k for k in range(60)) + "\\}", "\\pm" * 500 + "1",
    "\\text{" * 300, "$" * 1_000_000, "(1+x)^{2000}(1+y)^{2000}", "\\lfloor 10^{400} \\rfloor",
    "\\sqrt[10^{9}]{2}", "\\pi^{\\pi^{\\pi^{\\pi}}}", "0.\\overline{" + "3" * 1900 + "}",
    "\\gamma!", "\\pi!", "0.5!", "(1+i)!", "\\binom{0.5}{0.25}", "\\binom{2500}{1250}", "2500!",
    "(2^{20000}+" * 25 + "1" + ")" * 25, "2^{20000}+" * 140 + "1", "\\gamma!" * 200, "1 " * 900,
    "\\sin\\cos " * 15 + "1", "\\log(" * 25 + "7" + ")" * 25, "x\\sin x " * 120, "x^{0.1}" * 140,
]

@pytest.fixture
def no_collector():
    """No garbage collection while time is taken: of all that a long suite has left it takes one."""
    gc.disable()
    yield
    gc.enable()

@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_ends_within_a_second_in_any_thread(text, no_collector):
    calls = [(rf"\boxed{{{text}}}", "33"), (f"Answer: {text}", "33"), (text, "33"),
             ("\\boxed{33}", text), (rf"\boxed{{{text}+0}}", text)]
    seconds, verdicts = [], []

    def work():
        for response, gold in calls:
            start = time.process_time()
            verdicts.append(grade(response, gold))
            seconds.append(time.process_time() - start)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(10)
    assert not thread.is_alive() and max(seconds) < 1, seconds
    assert len(verdicts) == len(calls) and "correct" not in verdicts[:4]

def test_megabytes_end_within_a_second(no_collector):
    for response in ("x" * 3_000_000, "\\boxed{1}" * 300_000, "Answer: " * 300_000, "{" * 1_000_000,
                     "\\boxed{" * 150_000, "\\boxed{33}, \\boxed{34}" * 50_000, "<think>" * 100_000,
                     "answer " * 200_000, "\\boxed" + " " * 1_000_000, "</think>" * 200_000):
        start = time.process_time()
        assert grade(response, "33") != "correct"
        assert time.process_time() - start < 1

INJECTIONS = [
    "__import__('os').system('touch CANARY')", "exec(\"open('CANARY','w')\")", "`touch CANARY`",
    "().__class__.__bases__[0].__subclasses__()", "lambda: open('CANARY','w')", "${touch CANARY}",
    "os.system('touch CANARY')", "f'{open(\"CANARY\",\"w\")}'", "\\input{CANARY}",
    "eval(compile(\"open('CANARY','w')\",'','exec'))", "\\write18{touch CANARY}",
]

@pytest.mark.parametrize("text", INJECTIONS)
def test_code_never_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ), threading.active_count()

    def forbidden(*args, **kwargs):
        raise AssertionError("the verifier ran something")

    grade("\\boxed{\\pi}", "3")  # imports what it needs before the traps are set
    for owner, name in ((os, "system"), (os, "popen"), (subprocess, "Popen"),
                        (builtins, "eval"), (builtins, "exec")):
        monkeypatch.setattr(owner, name, forbidden)
    verdicts = [grade(rf"\boxed{{{text}}}", "33"), grade(f"Answer: {text}", "33"),
                grade("\\boxed{33}", text)]
    monkeypatch.undo()
    assert "correct" not in verdicts and "gave_up" not in verdicts
    assert not list(tmp_path.iterdir()) and (dict(os.environ), threading.active_count()) == before

def test_no_parser_that_evaluates_is_named():
    module = sys.modules[grade.__module__]
    for part in (grade, answers_equal, extract_answer, module._equal, module._normalise,
                 module._evaluate, module._Reader, module._values_equal):
        for name in ("sympify", "parse_expr", "lambdify", "eval(", "exec(", "simplify(", "signal",
                     "subprocess", "multiprocessing", "import os"):
            assert name not in inspect.getsource(part), (part, name)

def test_threads_agree_with_each_other():
    cases = [(rf"\boxed{{{given}}}", gold) for _, given, gold in RIGHT if "sqrt" in given]
    verdicts = []
    threads = [threading.Thread(target=lambda: verdicts.extend(grade(*case) for case in cases))
               for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(verdicts) == 4 * len(cases) and set(verdicts) == {"correct"}

def test_an_internal_error_is_counted_apart(monkeypatch):
    def broken(*args):
        raise RuntimeError("planted")

    monkeypatch.setattr(sys.modules[grade.__module__], "_equal", broken)
    assert grade("\\boxed{33}", "33") == "gave_up"
    assert answers_equal("33", "34") is False

def test_the_batch_of_a_step_is_fast():
    thought = f"<think>{'so ' * 2000}</think>"
    cases = [(rf"{thought} \boxed{{{given}}}", gold) for _, given, gold in RIGHT + WRONG]
    start = time.process_time()
    for k in range(1024):
        grade(*cases[k % len(cases)])
    assert time.process_time() - start < 2

def test_the_documentation_runs():
    module = sys.modules[grade.__module__]
    assert doctest.testmod(module).failed == 0
