// combine.cpp - `combine` on the CPU: chooses the instruction set, cuts the work, shares it among threads and adds up
// the partial sums in a fixed order. The loops are in combine_isa.cpp; the contract is combine.h.
#include "combine/combine.h"

#include <vector>

#include "combine/combine_isa.h"
#include "common/isa.h"
#include "common/parallel.h"

namespace pyflowmap {
namespace {

// 16384 float32 of one operand are 64 KB: large enough that a unit's set-up does not show, small enough that two
// threads share a small batch evenly.
constexpr int64_t kColumnsPerUnit = 16384;

// Below this many elements (rows x columns x tensors) a second thread costs more than it gains: see bench/bench_combine.py.
constexpr int64_t kElementsPerThread = 65536;
constexpr int64_t kNormalsPerThread = 8192;

// An output larger than this has left the last-level cache before anyone can read it again, so its stores skip it.
constexpr int64_t kStreamBytes = int64_t{12} << 20;

CombineUnits units_for(Isa isa) {
#if defined(PYFLOWMAP_HAS_V4)
  if (isa == Isa::v4) return v4::combine_units;
#endif
#if defined(PYFLOWMAP_HAS_V3)
  if (isa >= Isa::v3) return v3::combine_units;
#endif
  (void)isa;
  return base::combine_units;
}

bool same_storage(const Operand& x, const Operand& y) { return x.data && x.data == y.data; }

// Nothing in the call depends on the row, and rows follow one another: one long row does the same work.
bool rows_are_one(const CombineParams& p) {
  if (p.gram || p.cross || p.sums || p.noise.present || p.mask.data) return false;
  for (int j = 0; j < p.inputs; ++j) {
    if (p.x[j].row_stride != p.columns) return false;
  }
  for (int k = 0; k < p.outputs; ++k) {
    if (p.y[k].data && p.y[k].row_stride != p.columns) return false;
    for (int j = 0; j < p.inputs; ++j) {
      if (p.a[k][j].vector) return false;
    }
  }
  return true;
}

bool is_direct(const CombineParams& p, const CombinePlan& plan) {
  if (p.outputs > 2 || plan.reductions > 0 || p.noise.present || p.mask.data) return false;
  bool direct = true, wide = false, single = false;
  const auto look = [&](const Operand& x) {
    wide |= x.dtype == DType::f64;
    single |= x.dtype == DType::f32;
    direct &= x.data && (x.dtype == DType::f32 || x.dtype == DType::f64);
  };
  for (int j = 0; j < p.inputs; ++j) look(p.x[j]);
  for (int k = 0; k < p.outputs; ++k) {
    look(p.y[k]);
    direct &= !plan.stage[k] && !p.clamp[k];
  }
  return direct && wide != single;
}

int reductions(const CombineParams& p) {
  const int terms = p.inputs + (p.noise.present ? 1 : 0);
  return (p.gram ? p.outputs * (p.outputs + 1) / 2 : 0) + (p.cross ? p.outputs * terms : 0) + (p.sums ? p.outputs : 0);
}

template <class A> void scatter(const CombineParams& p, int64_t row, const double* sum) {
  const int K = p.outputs, terms = p.inputs + (p.noise.present ? 1 : 0);
  if (p.gram) {
    A* to = static_cast<A*>(p.gram) + row * K * K;
    for (int k = 0; k < K; ++k) {
      for (int l = k; l < K; ++l, ++sum) to[k * K + l] = to[l * K + k] = static_cast<A>(*sum);
    }
  }
  if (p.cross) {
    A* to = static_cast<A*>(p.cross) + row * K * terms;
    for (int i = 0; i < K * terms; ++i) to[i] = static_cast<A>(*sum++);
  }
  if (p.sums) {
    A* to = static_cast<A*>(p.sums) + row * K;
    for (int k = 0; k < K; ++k) to[k] = static_cast<A>(*sum++);
  }
}

void add_up(const CombineParams& p, const CombinePlan& plan) {
  bool wide = false;
  for (int j = 0; j < p.inputs; ++j) wide |= p.x[j].dtype == DType::f64;
  for (int k = 0; k < p.outputs; ++k) wide |= p.y[k].dtype == DType::f64;
  for (int64_t row = 0; row < p.rows; ++row) {
    double* first = plan.partials + row * plan.units_per_row * plan.reductions;
    for (int64_t unit = 1; unit < plan.units_per_row; ++unit) {
      for (int i = 0; i < plan.reductions; ++i) first[i] += first[unit * plan.reductions + i];
    }
    if (wide) scatter<double>(p, row, first);
    else scatter<float>(p, row, first);
  }
}

}  // namespace

void flatten_rows(CombineParams* p) {
  if (p->rows <= 1 || !rows_are_one(*p)) return;
  p->columns *= p->rows;
  p->rows = 1;
  for (int j = 0; j < p->inputs; ++j) p->x[j].row_stride = p->columns;
  for (int k = 0; k < p->outputs; ++k) p->y[k].row_stride = p->columns;
}

Status combine_cpu(const CombineParams& p) {
  if (p.rows == 0) return {};
  CombinePlan plan;
  plan.columns_per_unit = kColumnsPerUnit;
  plan.units_per_row = p.columns == 0 ? 1 : (p.columns + kColumnsPerUnit - 1) / kColumnsPerUnit;
  plan.reductions = reductions(p);
  for (int k = 0; k < p.outputs; ++k) {
    bool aliased = false;
    for (int j = 0; j < p.inputs; ++j) aliased |= same_storage(p.x[j], p.y[k]);
    plan.stage[k] = aliased && (p.outputs > 1 || p.cross);
    const int64_t bytes = p.rows * p.columns * size_of(p.y[k].dtype);
    const bool lines =
        reinterpret_cast<uintptr_t>(p.y[k].data) % 64 == 0 && p.y[k].row_stride * size_of(p.y[k].dtype) % 64 == 0;
    plan.stream[k] = lines && bytes >= kStreamBytes;
  }
  plan.direct = is_direct(p, plan);
  const int64_t units = p.rows * plan.units_per_row;
  std::vector<double> partials;
  if (plan.reductions > 0) {
    partials.assign(static_cast<size_t>(units * plan.reductions), 0.0);
    plan.partials = partials.data();
  }

  const CombineUnits run = units_for(active_isa());
  const int64_t elements = p.rows * p.columns;
  int64_t threads = elements * (p.inputs + p.outputs) / kElementsPerThread;
  if (p.noise.present) threads += elements / kNormalsPerThread;
  share(units, threads, [&](int64_t first, int64_t last) { run(p, plan, first, last); });
  if (plan.reductions > 0) add_up(p, plan);
  return {};
}

}  // namespace pyflowmap
