// What became of a cell of score_matrix.h: each pass gave right results, or its sentence.
#pragma once

#include <functional>
#include <string>

#include "attempt.h"
#include "matrix.h"
#include "matrix_report.h"
#include "runner.h"

namespace flashtile::test {

// `said`: by what refuses something of the cell; `attempt`: of what does not, else not asked.
void report_score_cell(const Cell& cell, const std::string& where, const Run::Refusals& said,
                       const std::function<Attempt()>& attempt, MatrixReport& report);

}  // namespace flashtile::test
